"""What users read and write of a wrapped optimizer's state: whole parameters, decoded.

What was read is kept until the next step. Before anything else uses the state, values that were
assigned, deleted or changed in place are found by identity and version counter, and stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from optstate_wrap.state.encoder import Encoder
from optstate_wrap.state.inference import ordinary_tensors
from optstate_wrap.state.param_chunks import ParamChunk
from optstate_wrap.state.record import Coded, Record, decode_state, reencode
from optstate_wrap.state.slicing import chunks_of_lengths, join_states, record_numel, slice_state
from optstate_wrap.state.store import Store

__all__ = ["DecodedStates"]


@dataclass
class _Shown:
    """The state of a parameter as somebody has read it.

    Attributes:
        state: what the reader has.
        seen: each of its values when it was last stored, with its version.
        kept: keys whose value is the very object that is stored.
    """

    state: dict[str, Any]
    seen: dict[str, tuple[Any, int | None]] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()

    def note(self, kept: frozenset[str]) -> None:
        """What is there now is what is stored."""
        self.seen = {key: (value, _version(value)) for key, value in self.state.items()}
        self.kept = kept

    def changed(self) -> set[str]:
        """Keys whose values differ from what is stored."""
        return {key for key, value in self.state.items() if self._differs(key, value)}

    def _differs(self, key: str, value: Any) -> bool:
        if key not in self.seen or self.seen[key][0] is not value:
            return True
        if key in self.kept or isinstance(value, (bool, int, float, str, type(None))):
            return False
        version = _version(value)
        return version is None or version != self.seen[key][1]


def _version(value: Any) -> int | None:
    """How often a tensor has been changed in place; None where nobody counts."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


class RecordUser(Protocol):
    """Code that keeps references to stored records between steps."""

    def forget(self) -> None:
        """Drop the references to all records."""

    def release(self, param: Tensor) -> None:
        """Drop the references to the records of ``param``, which then hold its latest state."""


class DecodedStates:
    """Every parameter's state as the inner optimizer keeps it, over the records of a store.

    Args:
        store: where records are.
        encoder: decides how they are made.
        fused: may have records of its own, which are to go with those of the store.

    Attributes:
        extra: entries of the inner optimizer's ``state`` under keys that are not parameters.
        foreign: by parameter, entries of its state that the optimizer does not make. They are kept
            as they are.
        known: the keys that the optimizer makes; None: nobody knows.
    """

    def __init__(self, store: Store, encoder: Encoder, fused: RecordUser) -> None:
        self.store = store
        self.encoder = encoder
        self.fused = fused
        self.extra: dict[Any, Any] = {}
        self.foreign: dict[Tensor, dict[str, Any]] = {}
        self.known: frozenset[str] | None = None
        self._shown: dict[Tensor, _Shown] = {}

    def __contains__(self, param: object) -> bool:
        self.write_back()
        return param in self.store or param in self.foreign

    def __iter__(self) -> Iterator[Tensor]:
        self.write_back()
        yield from dict.fromkeys([*self.store, *self.foreign])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def read(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter, the same object until the next step."""
        shown = self._shown.get(param)
        if shown is None:
            shown = self._shown[param] = _Shown(self._whole(param, shared=True))
            shown.note(self._kept(param, shown.state))
        return shown.state

    def copy(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter; what the optimizer has made of it in copies."""
        self.write_back()
        return self._whole(param, shared=False)

    def write(self, param: Tensor, state: dict[str, Any]) -> None:
        """Make this the whole state of a parameter, and what is read of it."""
        old = self._shown.get(param)
        shown = self._shown[param] = _Shown(state)
        if old is not None:
            # what stays of it is not to be rounded again
            shown.seen, shown.kept = old.seen, old.kept
        self._store(param, shown)

    def write_back(self) -> None:
        """Store what has changed of what was read."""
        for param, shown in self._shown.items():
            if shown.state.keys() != shown.seen.keys() or shown.changed():
                self._store(param, shown)

    def forget(self) -> None:
        """Let go of what was read."""
        self._shown.clear()

    def drop(self, param: Tensor) -> None:
        """Forget the state of a parameter."""
        if param not in self:
            raise KeyError(param)
        self._shown.pop(param, None)
        self.foreign.pop(param, None)
        self._drop_records(param)

    def clear(self) -> None:
        """Forget everything."""
        self.forget()
        self.extra, self.foreign = {}, {}
        self.store.clear()
        self.fused.forget()

    def replace(
        self,
        records: dict[Tensor, list[Record]],
        foreign: dict[Tensor, dict[str, Any]],
        extra: dict[Any, Any],
    ) -> None:
        """Replace all state: stored records, foreign entries and extra entries."""
        self.forget()
        self.fused.forget()
        self.store.replace(records)
        self.foreign, self.extra = foreign, extra

    def foreign_entries(self, chunk: ParamChunk) -> dict[str, Any]:
        """What is foreign in the state of a chunk, as the optimizer is to see it in its step."""
        foreign = self.foreign.get(chunk.param, {})
        if chunk.parts == 1:
            return dict(foreign)
        order = self.store.layout(chunk.param).order
        return {
            # a view, where it lies in memory as the parameter does
            key: value.permute(order).reshape(-1)[chunk.start : chunk.stop]
            if isinstance(value, Tensor) and value.shape == chunk.param.shape
            else value
            for key, value in foreign.items()
        }

    def take_foreign_back(self, chunk: ParamChunk, state: dict[str, Any]) -> None:
        """Take from the state of a stepped chunk what was lent."""
        foreign = self.foreign.get(chunk.param)
        if foreign is not None:
            now = {key: state.pop(key) for key in foreign if key in state}
            if chunk.parts == 1:
                self.foreign[chunk.param] = now

    def resplit(self, param: Tensor, chunks: Sequence[ParamChunk]) -> None:
        """Store the records of a parameter anew, by other chunks."""
        own, encode = self._decoded(param, shared=False), self.encoder.encode
        self.store.save(
            param, [encode(chunk, chunk.data(), slice_state(own, chunk)) for chunk in chunks]
        )

    def _whole(self, param: Tensor, shared: bool) -> dict[str, Any]:
        own = self._decoded(param, shared) if param in self.store else {}
        return {**own, **self.foreign.get(param, {})}

    def _decoded(self, param: Tensor, shared: bool) -> dict[str, Any]:
        """The optimizer's own state of a parameter; ``shared``: what is not coded is not copied."""
        with ordinary_tensors():
            of = self._stored_chunks(param)
            records = [record or {} for record in self.store.load(of)]
            states = [_shared(r, param) if shared else decode_state(r, param) for r in records]
            return join_states(states, of, self.store.layout(param))

    def _stored_chunks(self, param: Tensor) -> list[ParamChunk]:
        """The chunks that a parameter's records are of."""
        return chunks_of_lengths(
            param, [record_numel(record) for record in self.store.records(param)]
        )

    def _kept(self, param: Tensor, state: Mapping[str, Any]) -> frozenset[str]:
        """Keys whose value in a state is what is stored."""
        records = self.store.latest_records(param)
        stored = {**(records[0] if len(records) == 1 else {}), **self.foreign.get(param, {})}
        return frozenset(key for key, value in state.items() if stored.get(key) is value)

    def _store(self, param: Tensor, shown: _Shown) -> None:
        """Store the whole of a state; what has not changed stays as it is stored."""
        changed = shown.changed()
        stored = set(self.store.latest_records(param)[0]) if param in self.store else set()
        own, foreign = dict[str, Any](), dict[str, Any]()
        for key, value in shown.state.items():
            (own if self._is_own(param, key, stored) else foreign)[key] = value
        if foreign:
            self.foreign[param] = foreign
        else:
            self.foreign.pop(param, None)
        if not own:
            self._drop_records(param)
        elif own.keys() & changed or stored - own.keys():
            with ordinary_tensors():
                self._store_own(param, own, changed)
        shown.note(self._kept(param, shown.state))

    def _is_own(self, param: Tensor, key: str, stored: set[str]) -> bool:
        if key in stored or key in self.foreign.get(param, {}):
            return key in stored
        # of an optimizer that nobody knows, what comes beside its own state is not its own
        return not stored if self.known is None else key in self.known

    def _store_own(self, param: Tensor, own: Mapping[str, Any], changed: set[str]) -> None:
        chunks = self.encoder.chunks_of(param)
        olds: list[Record] = [{} for _ in chunks]
        layout = None
        if chunks and param in self.store:
            number = chunks[0].number
            kept, layout = self._stored_chunks(param), self.store.layout(param)
            if len(kept) == 1 or kept[-1].stop == torch.Size(layout.shape).numel():
                chunks = [replace(chunk, number=number) for chunk in kept]
                olds = [record or {} for record in self.store.load(kept)]
        records = []
        for chunk, old in zip(chunks, olds, strict=True):
            part, counter = slice_state(own, chunk, layout), self.encoder.counter(chunk)
            formats = self.encoder.formats(param, part)
            records.append(reencode(old, part, changed, chunk.like(), formats, counter))
        # of a parameter that is not the optimizer's, nobody knows how it would be stored
        self.store.save(param, records or [dict(own)], layout)

    def _drop_records(self, param: Tensor) -> None:
        if param in self.store:
            self.fused.release(param)
            self.store.drop(param)

    def __getstate__(self) -> dict[str, Any]:
        self.write_back()
        return {**self.__dict__, "_shown": {}}


def _shared(record: Record, param: Tensor) -> dict[str, Any]:
    """The state of a record, in which what is not coded is what the record holds."""
    coded = {key: value for key, value in record.items() if isinstance(value, Coded)}
    return {**record, **decode_state(coded, param)}
