"""What the state of one parameter, or of one part of it, is stored as.

A record is the optimizer's own state dict with some tensors replaced by ``Coded`` ones. Coded
tensors are never changed: a step makes new ones. Others are stepped in place.
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
from optstate_codecs.state.layout import FlatView, inverse_order, slices, storage_order
from optstate_codecs.state.moments import decode_slice, encode_slice, raise_underflow
from optstate_wrap.state.sharding import local_of, rewrapped

__all__ = [
    "Coded",
    "Record",
    "codable",
    "decode_state",
    "encode_state",
    "reencode",
    "select",
    "tensors_of",
]

Record = dict[str, Any]

CODED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: the second moments whose root divides a first moment, by the names that optimizers give them
SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "ema_squared")
#: random streams, as the rules of optstate_codecs number those of the same names
STREAMS = {"exp_avg": 2, "exp_avg_sq": 3, "max_exp_avg_sq": 1, "momentum_buffer": 1}


@dataclass(frozen=True)
class Coded:
    """One tensor, stored in a format.

    Attributes:
        format: of it; ``bound`` is as it stores a tensor of this shape.
        parts: the flat components, in the format's order.
        dtype: that the optimizer gave the tensor.
        shape: of the tensor.
        order: its dimensions from the slowest to the fastest, the order of the components.
        root: the key whose root multiplies what is stored, or "".
    """

    format: Format
    parts: tuple[Tensor, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]
    root: str = ""

    @cached_property
    def bound(self) -> Format:
        """The format as it stores a tensor of this shape."""
        return self.format.for_shape(self.shape, self.order)

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device) -> Coded:
        """The same with its components on ``device``."""
        return replace(self, parts=tuple(part.to(device) for part in self.parts))


def codable(value: Any, like: Tensor) -> bool:
    """Whether a value of the state of ``like`` holds one number per element, and may be coded."""
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
    """The record of a state.

    Args:
        state: as the optimizer left it; what is not coded is taken over, not copied.
        like: the parameter, or the part of it; gives shape and order.
        formats: by key; a key that has none, or None, stays exact.
        counter: random numbers for formats that round stochastically.
    """
    chosen = {
        key: format
        for key, value in state.items()
        if (format := formats.get(key)) is not None and codable(value, like)
        if not _exact(format, value.dtype)
    }
    if not chosen:
        return dict(state)
    # of the whole parameter, as ``codable`` compares shapes
    roots = {key: _root_key(key, state, like) for key, f in chosen.items() if f.in_update_units}
    like = local_of(like)
    order = storage_order(like)
    chosen = {key: replace(format, min_elements=0) for key, format in chosen.items()}
    for root in roots.values():
        # a moment that another is held in units of is read with it, and is coded along
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
    """The record of a state that was decoded and then changed; what was not keeps its codes.

    Args:
        old: the record that was decoded.
        state: what has become of it.
        changed: keys whose values have changed.
        like: as for ``encode_state``.
        formats: of keys that ``old`` has not; the others keep the format that they have there.
        counter: as for ``encode_state``.
    """
    stored = {key: value for key, value in old.items() if isinstance(value, Coded)}
    lies = tuple(local_of(like).shape), storage_order(local_of(like))
    if any((value.shape, value.order) != lies for value in stored.values()):
        changed = set(state)
    wanted: dict[str, Format] = {}
    unchanged = []
    for key in state:
        root = stored[key].root if key in stored else ""
        if key in old and key not in changed and not (root and _loses(root, state, changed)):
            unchanged.append(key)
            continue
        format = stored[key].format if key in stored else None if key in old else formats.get(key)
        # without what it would be divided by, it stays exact
        if format is not None and not (format.in_update_units and not _roots(key, state, like)):
            wanted[key] = format
    record = encode_state(state, like, wanted, counter)
    for key in unchanged:
        # what is exact may now be coded, exactly, along with what is held in units of it
        if key in stored or not isinstance(record[key], Coded):
            record[key] = old[key]
    return record


def _loses(root: str, state: Mapping[str, Any], changed: Collection[str]) -> bool:
    return root in changed or root not in state


def _exact(format: Format, dtype: torch.dtype) -> bool:
    return format.name == FP32.name and dtype != torch.float64


def _roots(key: str, state: Mapping[str, Any], like: Tensor) -> list[str]:
    """The keys of second moments that ``key`` may be held in units of."""
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
    like = local_of(state[next(iter(coded))])
    for start, stop in slices(like, formats.values()):
        decoded = {key: view.read(start, stop).to(torch.float32) for key, view in views.items()}
        decoded = raise_underflow(moments, formats, decoded)
        encode_slice(moments, formats, decoded, _parts(coded, start, stop), counter, start)


def _parts(coded: Mapping[str, Coded], start: int, stop: int) -> dict[str, list[Tensor]]:
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
    keep: Callable[[Tensor], None] | None = None,
) -> dict[str, Any]:
    """The state of a record: copies, each in the dtype that the optimizer gave it.

    Args:
        record: of one parameter or part.
        like: the parameter; where it is sharded, so is what is decoded.
        keep: what is stored as it is, and not small, is given to this and not copied.
    """
    coded = {key: value for key, value in record.items() if isinstance(value, Coded)}
    decoded = _decode(coded) if coded else {}
    return {
        key: rewrapped(decoded[key], like) if key in decoded else _copied(value, keep)
        for key, value in record.items()
    }


def _copied(value: Any, keep: Callable[[Tensor], None] | None) -> Any:
    if isinstance(value, Tensor):
        if keep is not None and value.dim():
            keep(value)
            return value
        # as clone, but of an optimizer's state there is no graph
        return value.detach().clone()
    return value if isinstance(value, (int, float, str, type(None))) else copy.deepcopy(value)


def _decode(coded: Mapping[str, Coded]) -> dict[str, Tensor]:
    first = next(iter(coded.values()))
    numel, device = first.numel, first.parts[0].device
    formats = {key: stored.bound for key, stored in coded.items()}
    moments = _moments(coded)
    flat = {key: torch.empty(numel, dtype=s.dtype, device=device) for key, s in coded.items()}
    for start, stop in slices(next(iter(flat.values())), formats.values()):
        parts = _parts(coded, start, stop)
        decoded = decode_slice(moments, formats, parts, torch.float32, stop - start)
        for key, value in decoded.items():
            flat[key][start:stop] = value
    ordered = [first.shape[d] for d in first.order]
    inverse = inverse_order(first.order)
    return {key: value.view(ordered).permute(inverse) for key, value in flat.items()}


def select(flag: Tensor, old: Mapping[str, Any], new: Record) -> Record:
    """``old`` where ``flag`` (0-d) is not zero, else ``new``; decided on the device.

    For a step that an inner optimizer skips on the device: what did not change is not rounded anew.
    """
    chosen = dict(new)
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Coded) and isinstance(before, Coded) and _alike(value, before):
            skipped = flag.to(value.parts[0].device) != 0
            pairs = zip(before.parts, value.parts, strict=True)
            parts = tuple(torch.where(skipped, a, b) for a, b in pairs)
            chosen[key] = replace(value, parts=parts)
    return chosen


def _alike(a: Coded, b: Coded) -> bool:
    return a.format == b.format and a.shape == b.shape and a.order == b.order


def tensors_of(record: Any) -> Iterable[Tensor]:
    """Every tensor that a record holds."""
    if isinstance(record, Coded):
        yield from record.parts
    elif isinstance(record, Tensor):
        yield record
    elif hasattr(record, "back"):
        yield record.tensor
    elif isinstance(record, Mapping):
        for value in record.values():
            yield from tensors_of(value)
    elif isinstance(record, (list, tuple)):
        for value in record:
            yield from tensors_of(value)
