"""Decodes and encodes the moments of one slice together.

They belong together because a format may store a first moment in *update units*, as u = m /
sqrt(v), of which the update is made. Then codes are used equally well for large and for small
gradients, and no rounding of m makes a step longer than v allows. Decoding multiplies by the stored
sqrt(v) again, so u stays the same from one step to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optstate_codecs import exact
from optstate_codecs.formats import Format
from optstate_codecs.rounding import Counter
from optstate_codecs.rules import Moment

__all__ = [
    "SMALLEST_ROOT",
    "decode_slice",
    "encode_slice",
    "quantization_residual",
    "raise_underflow",
    "without_underflow",
]

# the root of float32's smallest normal number; replaces the roots of underflowed second moments
SMALLEST_ROOT = 2.0**-63

Parts = Mapping[str, Sequence[Tensor]]


def decode_slice(
    moments: Sequence[Moment],
    formats: Mapping[str, Format],
    parts: Parts,
    dtype: torch.dtype,
    count: int | None = None,
) -> dict[str, Tensor]:
    """Decode the moments of one slice.

    Args:
        moments: the rule's moments.
        formats: the format of each.
        parts: the flat component slices of each, in the format's order.
        dtype: of the result, float32 or float64.
        count: elements of the slice; needed where codes share bytes, whose last may hold one more.

    Returns:
        Each moment, flat; a view of its component if that is the moment itself.
    """
    decoded = {m.name: formats[m.name].decode(parts[m.name])[:count].to(dtype) for m in moments}
    for moment in moments:
        if formats[moment.name].in_update_units:
            decoded[moment.name] *= exact.sqrt(decoded[_divisor(moment)])
    return decoded


def encode_slice(
    moments: Sequence[Moment],
    formats: Mapping[str, Format],
    decoded: Mapping[str, Tensor],
    parts: Parts,
    counter: Counter,
    start: int,
) -> None:
    """Encode the moments of the slice that begins at element ``start`` into ``parts``."""
    for moment in moments:
        format = formats[moment.name]
        value = decoded[moment.name]
        if format.in_update_units:
            value = value / _root(moment, decoded)
        draw = counter.stream(moment.stream).at(start)
        format.encode(value.to(torch.float32), parts[moment.name], draw)


def raise_underflow(
    moments: Sequence[Moment], formats: Mapping[str, Format], decoded: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Moments of ``torch.optim`` or of other formats, ready for ``encode_slice``.

    Where a first moment is stored in update units, ``without_underflow`` raises its second moment.
    Moments that a step has computed need none of this.
    """
    decoded = dict(decoded)
    for moment in moments:
        if formats[moment.name].in_update_units:
            name = _divisor(moment)
            decoded[name] = without_underflow(decoded[name], decoded[moment.name])
    return decoded


def without_underflow(second: Tensor, first: Tensor) -> Tensor:
    """Second moments; those below float32's normal numbers are raised to the first moment's square.

    A second moment that has underflowed, as 3e-8 does in float16, tells nothing about gradients.
    Dividing by its root would give a step of any length, and in update units the largest number of
    a block, next to which all others round to zero. With the square, a step is at most the learning
    rate. In a step in float32, the first moment of an underflowed second moment is as small.

    Args:
        second: float32.
        first: float32, the same shape.

    Returns:
        A new tensor; NaN where the first moment is not finite, as a step would make it.
    """
    floor = torch.maximum(second, first.square())
    return torch.where(second < SMALLEST_ROOT**2, floor, second).add_(first - first)


def quantization_residual(
    moment: Moment, formats: Mapping[str, Format], decoded: Mapping[str, Tensor], parts: Parts
) -> Tensor:
    """The difference between a moment and its stored value after ``encode_slice``.

    In update units the stored value is the stored number times the root before that was rounded.
    It is zero where the second moment is, as decoding makes it.
    """
    value, format = decoded[moment.name], formats[moment.name]
    stored = format.decode(parts[moment.name])[: value.numel()].to(value.dtype)
    if format.in_update_units:
        stored = stored * exact.sqrt(decoded[_divisor(moment)])
    return value - stored


def _root(moment: Moment, decoded: Mapping[str, Tensor]) -> Tensor:
    return exact.sqrt(decoded[_divisor(moment)]).clamp_(min=SMALLEST_ROOT)


def _divisor(moment: Moment) -> str:
    if moment.relative_to is None:
        raise ValueError(f"moment {moment.name!r}: has no update units; use units='value'")
    return moment.relative_to
