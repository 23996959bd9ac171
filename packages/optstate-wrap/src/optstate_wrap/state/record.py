"""Records: the state of one chunk as it is stored, and its encoding and decoding.

A record is the optimizer's own state dict with some tensors replaced by ``Coded`` ones. A step
never changes a ``Coded`` tensor but makes a new one. It changes all other tensors in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.formats import FP32, Format
from optstate_codecs.rounding import Counter
from optstate_codecs.rules import Moment
from optstate_codecs.sharding import local_of, placed_like
from optstate_codecs.state.layout import FlatView, inverse_order, slices, storage_order
from optstate_codecs.state.moments import decode_slice, encode_slice, raise_underflow

__all__ = [
    "CODED_DTYPES",
    "Coded",
    "OffloadedTensor",
    "Record",
    "codable",
    "decode_state",
    "encode_state",
    "reencode",
    "select",
    "stored_tensor",
    "tensors_of",
]

Record = dict[str, Any]

CODED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: keys of the second moments whose root divides a first moment, in torch's optimizers
SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "ema_squared")
#: random streams, numbered as in the rules of optstate_codecs
STREAMS = {"exp_avg": 2, "exp_avg_sq": 3, "max_exp_avg_sq": 1, "momentum_buffer": 1}


@dataclass(frozen=True)
class Coded:
    """One encoded tensor.

    Attributes:
        format: how it is stored, for any shape; ``bound`` is the same for this shape.
        parts: its components, flat, in the format's order.
        dtype: of the decoded tensor.
        shape: of the decoded tensor.
        order: dimensions in the memory order of the components, slowest first.
        root: key of the second moment whose root multiplies the stored values, or "".
    """

    format: Format
    parts: tuple[Tensor, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]
    root: str = ""

    @cached_property
    def bound(self) -> Format:
        """The format bound to this shape and order."""
        return self.format.for_shape(self.shape, self.order)

    @property
    def numel(self) -> int:
        """Elements of the decoded tensor."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the components."""
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device) -> Coded:
        """The same encoded tensor with its components on ``device``."""
        return replace(self, parts=tuple(part.to(device) for part in self.parts))


@dataclass(frozen=True)
class OffloadedTensor:
    """A tensor stored on the host and used on ``device``."""

    tensor: Tensor
    device: torch.device

    def copy_to_device(self) -> Tensor:
        """A copy of the tensor on the device that uses it."""
        return self.tensor.to(self.device, copy=True)


def codable(value: Any, like: Tensor) -> bool:
    """Whether a value of the state of ``like`` can be encoded: one number per element."""
    return (
        isinstance(value, Tensor)
        and value.dtype in CODED_DTYPES
        and value.layout is torch.strided
        and value.dim() > 0
        and value.shape == like.shape
        and value.numel() > 0
    )


def encode_state(
    state: Mapping[str, Any], like: Tensor, formats: Mapping[str, Format | None], counter: Counter
) -> Record:
    """Encode a state.

    Args:
        state: as the optimizer left it. Values that are not encoded are not copied either.
        like: the parameter, or the slice of it; gives shape and memory order.
        formats: by key; keys without a format stay exact.
        counter: keys the random numbers of formats that round stochastically.
    """
    chosen = {
        key: format
        for key, value in state.items()
        if (format := formats.get(key)) is not None and codable(value, like)
        # fp32 stores all dtypes but float64 exactly, so that they need no encoding
        if format.name != FP32.name or value.dtype == torch.float64
    }
    if not chosen:
        return dict(state)
    # before ``like`` becomes the local shard, since ``codable`` compares whole shapes
    roots = {key: _root_key(key, state, like) for key, f in chosen.items() if f.in_update_units}
    like = local_of(like)
    order = storage_order(like)
    chosen = {key: replace(format, min_elements=0) for key, format in chosen.items()}
    for root in roots.values():
        # decoding a moment in update units needs its second moment in coded form too
        chosen.setdefault(root, FP32())
    record = dict(state)
    for key, format in chosen.items():
        parts = tuple(
            torch.zeros(c.length(like.numel()), dtype=c.dtype, device=local_of(state[key]).device)
            for c in format.for_shape(like.shape, order).components
        )
        shape = tuple(like.shape)
        record[key] = Coded(format, parts, state[key].dtype, shape, order, roots.get(key, ""))
    _encode(state, {key: record[key] for key in chosen}, counter)
    return record


def reencode(
    old: Mapping[str, Any],
    state: Mapping[str, Any],
    changed: Collection[str],
    like: Tensor,
    formats: Mapping[str, Format],
    counter: Counter,
) -> Record:
    """Encode a state that was decoded and then changed; unchanged values keep their codes.

    Args:
        old: the record before.
        state: the decoded state with its changes.
        changed: keys whose values have changed.
        like: as for ``encode_state``.
        formats: for keys that are not in ``old``; the others keep their format.
        counter: as for ``encode_state``.
    """
    stored = {key: value for key, value in old.items() if isinstance(value, Coded)}
    layout = tuple(local_of(like).shape), storage_order(local_of(like))
    if any((value.shape, value.order) != layout for value in stored.values()):
        changed = set(state)
    wanted: dict[str, Format] = {}
    unchanged = []
    for key in state:
        root = stored[key].root if key in stored else ""
        lost = bool(root) and (root in changed or root not in state)
        if key in old and key not in changed and not lost:
            unchanged.append(key)
            continue
        format = stored[key].format if key in stored else None if key in old else formats.get(key)
        # update units without a second moment are not possible: the value stays exact
        if format is not None and not (format.in_update_units and not _roots(key, state, like)):
            wanted[key] = format
    record = encode_state(state, like, wanted, counter)
    for key in unchanged:
        # an exact second moment may now be coded in fp32, for another moment in update units
        if key in stored or not isinstance(record[key], Coded):
            record[key] = old[key]
    return record


def _roots(key: str, state: Mapping[str, Any], like: Tensor) -> list[str]:
    """The keys of second moments whose root may divide ``key``."""
    return [n for n in SECOND_MOMENTS if n in state and n != key and codable(state[n], like)]


def _root_key(key: str, state: Mapping[str, Any], like: Tensor) -> str:
    for name in _roots(key, state, like):
        return name
    raise ValueError(
        f"codec of {key!r}: units='update' needs a second moment in the state, one of "
        f"{', '.join(SECOND_MOMENTS)}; use units='value'"
    )


def _moments(coded: Mapping[str, Coded]) -> tuple[Moment, ...]:
    free = [n for n in range(1, len(coded) + 4) if n not in STREAMS.values()]
    return tuple(
        Moment(
            key,
            signed=stored.format.keeps_sign,
            stream=STREAMS[key] if key in STREAMS else free.pop(0),
            relative_to=stored.root or None,
        )
        for key, stored in sorted(coded.items())
    )


def _encode(state: Mapping[str, Any], coded: Mapping[str, Coded], counter: Counter) -> None:
    first = next(iter(coded.values()))
    views = {key: FlatView(local_of(state[key].detach()), first.order) for key in coded}
    formats = {key: stored.bound for key, stored in coded.items()}
    moments = _moments(coded)
    for start, stop in slices(local_of(state[next(iter(coded))]), formats.values()):
        decoded = {key: view.read(start, stop).to(torch.float32) for key, view in views.items()}
        decoded = raise_underflow(moments, formats, decoded)
        parts = _component_slices(coded, start, stop)
        encode_slice(moments, formats, decoded, parts, counter, start)


def _component_slices(coded: Mapping[str, Coded], start: int, stop: int) -> dict[str, list[Tensor]]:
    return {
        key: [
            part[c.part(start, stop)]
            for part, c in zip(stored.parts, stored.bound.components, strict=True)
        ]
        for key, stored in coded.items()
    }


def decode_state(
    record: Mapping[str, Any],
    like: Tensor | None = None,
    on_alias: Callable[[Tensor], None] | None = None,
) -> dict[str, Any]:
    """Decode a record into copies, each in the dtype that the optimizer gave it.

    Args:
        record: of one chunk.
        like: the parameter; if it is a ``DTensor``, decoded tensors are too.
        on_alias: called with each uncoded tensor, which is then returned itself instead of a copy.
    """
    coded = {key: value for key, value in record.items() if isinstance(value, Coded)}
    decoded = _decode(coded) if coded else {}
    return {
        key: placed_like(decoded[key], like) if key in decoded else _copied(value, on_alias)
        for key, value in record.items()
    }


def _copied(value: Any, on_alias: Callable[[Tensor], None] | None) -> Any:
    if isinstance(value, Tensor):
        if on_alias is not None:
            on_alias(value)
            return value
        # state has no autograd graph
        return value.detach().clone()
    return value if isinstance(value, (int, float, str, type(None))) else copy.deepcopy(value)


def _decode(coded: Mapping[str, Coded]) -> dict[str, Tensor]:
    first = next(iter(coded.values()))
    numel, device = first.numel, first.parts[0].device
    formats = {key: stored.bound for key, stored in coded.items()}
    moments = _moments(coded)
    flat = {key: torch.empty(numel, dtype=s.dtype, device=device) for key, s in coded.items()}
    for start, stop in slices(next(iter(flat.values())), formats.values()):
        parts = _component_slices(coded, start, stop)
        decoded = decode_slice(moments, formats, parts, torch.float32, stop - start)
        for key, value in decoded.items():
            flat[key][start:stop] = value
    ordered, inverse = [first.shape[d] for d in first.order], inverse_order(first.order)
    return {key: value.view(ordered).permute(inverse) for key, value in flat.items()}


def select(flag: Tensor, old: Mapping[str, Any], new: Record) -> Record:
    """``old`` if ``flag`` (0-d) is not zero, else ``new``; decided on the device.

    If the inner optimizer skips a step on the device, this keeps the codes of unchanged state.
    """
    chosen = dict(new)
    for key, value in new.items():
        before = old.get(key)
        if not (isinstance(value, Coded) and isinstance(before, Coded)):
            continue
        if (before.format, before.shape, before.order) == (value.format, value.shape, value.order):
            skipped = flag.to(value.parts[0].device) != 0
            pairs = zip(before.parts, value.parts, strict=True)
            parts = tuple(torch.where(skipped, a, b) for a, b in pairs)
            chosen[key] = replace(value, parts=parts)
    return chosen


def stored_tensor(value: Any) -> Any:
    """The host tensor of an ``OffloadedTensor``; any other value itself."""
    return value.tensor if isinstance(value, OffloadedTensor) else value


def tensors_of(values: Any) -> Iterable[Tensor]:
    """All tensors in a record, or in records in mappings and sequences."""
    if isinstance(values, Coded):
        yield from values.parts
    elif isinstance(values, Tensor):
        yield values
    elif isinstance(values, OffloadedTensor):
        yield values.tensor
    elif isinstance(values, (Mapping, list, tuple)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from tensors_of(value)
