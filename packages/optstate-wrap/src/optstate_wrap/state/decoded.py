"""The decoded state of whole parameters, as users read and write it.

A state that was read stays decoded until the next step. Before anything else uses the state, its
values that were assigned, deleted or changed in place are found, by identity and by the tensors'
version counters, and stored.
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
class _ReadState:
    """The state of a parameter that a user has read.

    Attributes:
        state: the user's dict.
        stored: the value of each key when it was last stored, and its version.
        aliases: keys whose value is the stored object itself.
    """

    state: dict[str, Any]
    stored: dict[str, tuple[Any, int | None]] = field(default_factory=dict)
    aliases: frozenset[str] = frozenset()

    def mark_stored(self, aliases: frozenset[str]) -> None:
        """Note that the current values are stored."""
        self.stored = {key: (value, _version(value)) for key, value in self.state.items()}
        self.aliases = aliases

    def changed(self) -> set[str]:
        """Keys whose values may differ from the stored ones."""
        return {key for key, value in self.state.items() if self._differs(key, value)}

    def _differs(self, key: str, value: Any) -> bool:
        if key not in self.stored or self.stored[key][0] is not value:
            return True
        if key in self.aliases or isinstance(value, (bool, int, float, str, type(None))):
            return False
        version = _version(value)
        return version is None or version != self.stored[key][1]


def _version(value: Any) -> int | None:
    """The version counter of a tensor; None if it has none."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


class RecordUser(Protocol):
    """An object that refers to stored records between steps."""

    def forget(self) -> None:
        """Drop the references to all records."""

    def release(self, param: Tensor) -> None:
        """Drop the references to the records of ``param``, which then hold its latest state."""


class DecodedStates:
    """Reads and writes the state of every parameter, in decoded form, over the records of a store.

    Args:
        store: holds the records.
        encoder: makes the records.
        fused: refers to records too; told when they are replaced.

    Attributes:
        extra: entries of the inner optimizer's ``state`` under keys that are not parameters.
        foreign: by parameter, entries of its state that the optimizer did not make. They are
            stored unchanged.
        known: the state keys that the optimizer makes; None: unknown.
    """

    def __init__(self, store: Store, encoder: Encoder, fused: RecordUser) -> None:
        self.store = store
        self.encoder = encoder
        self.fused = fused
        self.extra: dict[Any, Any] = {}
        self.foreign: dict[Tensor, dict[str, Any]] = {}
        self.known: frozenset[str] | None = None
        self._read_states: dict[Tensor, _ReadState] = {}

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
        read = self._read_states.get(param)
        if read is None:
            read = self._read_states[param] = _ReadState(self._whole(param, alias=True))
            read.mark_stored(self._aliases(param, read.state))
        return read.state

    def copy(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter; values that the optimizer made are copies."""
        self.write_back()
        return self._whole(param, alias=False)

    def write(self, param: Tensor, state: dict[str, Any]) -> None:
        """Replace the whole state of a parameter by ``state``, which ``read`` then returns."""
        old = self._read_states.get(param)
        new = self._read_states[param] = _ReadState(state)
        if old is not None:
            # values that are in both are not rounded again
            new.stored, new.aliases = old.stored, old.aliases
        self._store(param, new)

    def write_back(self) -> None:
        """Store the changes that users made to states that they read."""
        for param, read in self._read_states.items():
            if read.state.keys() != read.stored.keys() or read.changed():
                self._store(param, read)

    def discard_read_states(self) -> None:
        """Forget the states that users have read; later changes to them have no effect."""
        self._read_states.clear()

    def drop(self, param: Tensor) -> None:
        """Remove the state of a parameter."""
        if param not in self:
            raise KeyError(param)
        self._read_states.pop(param, None)
        self.foreign.pop(param, None)
        self._drop_records(param)

    def clear(self) -> None:
        """Remove all state."""
        self.store.clear()
        self.replace({}, {}, {})

    def replace(
        self,
        records: dict[Tensor, list[Record]],
        foreign: dict[Tensor, dict[str, Any]],
        extra: dict[Any, Any],
    ) -> None:
        """Replace all state by these records, foreign entries and extra entries."""
        self.discard_read_states()
        self.fused.forget()
        self.store.replace(records)
        self.foreign, self.extra = foreign, extra

    def foreign_entries(self, chunk: ParamChunk) -> dict[str, Any]:
        """The foreign entries for the step of a chunk; tensors like the parameter are sliced."""
        foreign = self.foreign.get(chunk.param, {})
        if chunk.parts == 1:
            return dict(foreign)
        order = self.store.layout(chunk.param).order
        return {
            # a view, if the tensor has the parameter's memory order
            key: value.permute(order).reshape(-1)[chunk.start : chunk.stop]
            if isinstance(value, Tensor) and value.shape == chunk.param.shape
            else value
            for key, value in foreign.items()
        }

    def take_foreign_back(self, chunk: ParamChunk, state: dict[str, Any]) -> None:
        """Remove the foreign entries from the state of a stepped chunk, and keep their values."""
        foreign = self.foreign.get(chunk.param)
        if foreign is not None:
            now = {key: state.pop(key) for key in foreign if key in state}
            if chunk.parts == 1:
                self.foreign[chunk.param] = now

    def resplit(self, param: Tensor, chunks: Sequence[ParamChunk]) -> None:
        """Split the stored state of a parameter into other chunks."""
        own, encode = self._decoded(param, alias=False), self.encoder.encode
        records = [encode(chunk, chunk.data(), slice_state(own, chunk)) for chunk in chunks]
        self.store.save(param, records)

    def _whole(self, param: Tensor, alias: bool) -> dict[str, Any]:
        own = self._decoded(param, alias) if param in self.store else {}
        return {**own, **self.foreign.get(param, {})}

    def _decoded(self, param: Tensor, alias: bool) -> dict[str, Any]:
        """The optimizer's own state of a parameter; with ``alias``, uncoded values uncopied."""
        with ordinary_tensors():
            chunks = self._stored_chunks(param)
            records = [record or {} for record in self.store.load(chunks)]
            states = [_aliased(r, param) if alias else decode_state(r, param) for r in records]
            return join_states(states, chunks, self.store.layout(param))

    def _stored_chunks(self, param: Tensor) -> list[ParamChunk]:
        """The chunks of the parameter's records."""
        return chunks_of_lengths(param, list(map(record_numel, self.store.records(param))))

    def _aliases(self, param: Tensor, state: Mapping[str, Any]) -> frozenset[str]:
        """Keys whose value in ``state`` is the stored object itself."""
        records = self.store.latest_records(param)
        stored = {**(records[0] if len(records) == 1 else {}), **self.foreign.get(param, {})}
        return frozenset(key for key, value in state.items() if stored.get(key) is value)

    def _store(self, param: Tensor, read: _ReadState) -> None:
        """Store the changes of a state; unchanged values stay as they are stored."""
        changed = read.changed()
        stored = set(self.store.latest_records(param)[0]) if param in self.store else set()
        own, foreign = dict[str, Any](), dict[str, Any]()
        for key, value in read.state.items():
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
        read.mark_stored(self._aliases(param, read.state))

    def _is_own(self, param: Tensor, key: str, stored: set[str]) -> bool:
        """Whether the optimizer makes a key; if unknown, keys added to its stored ones are not."""
        if key in stored or key in self.foreign.get(param, {}):
            return key in stored
        return not stored if self.known is None else key in self.known

    def _store_own(self, param: Tensor, own: Mapping[str, Any], changed: set[str]) -> None:
        chunks = self.encoder.chunks_of(param)
        old_records: list[Record] = [{} for _ in chunks]
        layout = None
        if chunks and param in self.store:
            number = chunks[0].number
            stored, layout = self._stored_chunks(param), self.store.layout(param)
            if len(stored) == 1 or stored[-1].stop == torch.Size(layout.shape).numel():
                chunks = [replace(chunk, number=number) for chunk in stored]
                old_records = [record or {} for record in self.store.load(stored)]
        records = []
        for chunk, old in zip(chunks, old_records, strict=True):
            state, counter = slice_state(own, chunk, layout), self.encoder.counter(chunk)
            formats = self.encoder.formats(param, state)
            records.append(reencode(old, state, changed, chunk.like(), formats, counter))
        # a parameter that is not the optimizer's has no chunks; its state is stored exactly
        self.store.save(param, records or [dict(own)], layout)

    def _drop_records(self, param: Tensor) -> None:
        if param in self.store:
            self.fused.release(param)
            self.store.drop(param)

    def __getstate__(self) -> dict[str, Any]:
        self.write_back()
        return {**self.__dict__, "_read_states": {}}


def _aliased(record: Record, param: Tensor) -> dict[str, Any]:
    """The state of a record; its uncoded values are the record's own objects."""
    coded = {key: value for key, value in record.items() if isinstance(value, Coded)}
    return {**record, **decode_state(coded, param)}
