"""The moments of one slice, decoded and encoded together.

Together, because a format may hold a first moment in *update units*: as u = m / sqrt(v), the
number the update is made of. Its codes are then spent alike on parameters with large and with
small gradients, and no rounding of m can make a step that v does not allow. Decoding multiplies
by the stored sqrt(v) again, so u is what the step count carries from step to step.
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

# the root of float32's smallest normal number, in place of the roots of what underflowed
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
        count: elements of the slice; needed where codes share bytes, which may hold one more.

    Returns:
        Each moment, flat; a view of its component where that is the moment itself.
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
    """Moments to encode that no step here has made: those of ``torch.optim`` or of other formats.

    Where a format holds a first moment in update units, its second moment is ``without_underflow``.
    """
    decoded = dict(decoded)
    for moment in moments:
        if formats[moment.name].in_update_units:
            name = _divisor(moment)
            decoded[name] = without_underflow(decoded[name], decoded[moment.name])
    return decoded


def without_underflow(second: Tensor, first: Tensor) -> Tensor:
    """Second moments, those below float32's normal numbers raised to the first moment's square.

    One that has underflowed, as 3e-8 does in float16, says nothing of the gradients any more. To
    divide by its root would be a step of any length, and in update units the largest number of a
    block, beside which all others are zero. With its square in place the step is the learning
    rate's length at most. Steps need none of this: what underflows in float32 has a first moment
    that is as small.

    Args:
        second: float32.
        first: float32, the same shape.

    Returns:
        A new tensor: NaN where the first moment is not finite, as it is after a step that made it
        so.
    """
    floor = torch.maximum(second, first.square())
    return torch.where(second < SMALLEST_ROOT**2, floor, second).add_(first - first)


def quantization_residual(
    moment: Moment, formats: Mapping[str, Format], decoded: Mapping[str, Tensor], parts: Parts
) -> Tensor:
    """What ``encode_slice`` has left out of a moment: it, less what is stored of it.

    In update units that is less the stored number times the root as it was before it was stored.
    """
    value, format = decoded[moment.name], formats[moment.name]
    stored = format.decode(parts[moment.name])[: value.numel()].to(value.dtype)
    return value - (stored * _root(moment, decoded) if format.in_update_units else stored)


def _root(moment: Moment, decoded: Mapping[str, Tensor]) -> Tensor:
    return exact.sqrt(decoded[_divisor(moment)]).clamp_(min=SMALLEST_ROOT)


def _divisor(moment: Moment) -> str:
    if moment.relative_to is None:
        raise ValueError(f"moment {moment.name!r}: has no update units; use units='value'")
    return moment.relative_to
