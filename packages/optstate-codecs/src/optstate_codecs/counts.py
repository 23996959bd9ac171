"""Step counts: float32 numbers as in ``torch.optim``, which also count beyond 2^24.

Adding 1 to 2^24 changes nothing in float32. Bias corrections are 1 long before, but random numbers
are keyed by the count and would repeat. So from 2^24 on, a step moves the count to the next float32
number: 2^24, 2^24 + 2, 2^24 + 4 ... 2^25, 2^25 + 4 and so on. The bits of these numbers count the
steps, so nothing else is stored. A count below 2^24 is the number of steps. The largest float32
number is reached after 889,192,447 steps.
"""

from __future__ import annotations

import struct
from math import inf
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.plain import plain_value

__all__ = [
    "END",
    "LAST_STEP",
    "OFFSET",
    "advance",
    "as_step",
    "checked_count",
    "counted",
    "take_back",
    "taken",
]

# the end of plain counting in float32; from there on the bits minus OFFSET are the steps taken
END = 1 << 24
OFFSET = 0x4B800000 - END
LAST = 0x7F7FFFFF - OFFSET
#: the largest count, float32's largest number
LAST_STEP = float.fromhex("0x1.fffffep+127")
# a number from 2^24 on times this is 5/8 to 5/4 of the distance to the next float32 number, so that
# adding it gives that number. From 2^23 on it is 5/8 to 5/4, and adding it adds 1.
TO_NEXT = 1.25 * 2.0**-24


def taken(step: float) -> int:
    """The number of steps that the count ``step``, from ``state["step"]``, stands for.

    Examples:
        >>> taken(2.0**24 + 4)
        16777218
    """
    if step < END:
        return int(step)
    bits: int = struct.unpack("<i", struct.pack("<f", step))[0]
    return bits - OFFSET


def checked_count(name: str, step: Any) -> float:
    """A step count from a state dict, a number or a tensor, as a number.

    Raises:
        ValueError: it is not a whole number of at least 0.
    """
    step = plain_value(step)
    count = step
    if isinstance(step, Tensor) and step.numel() == 1 and not (step.is_meta or step.is_quantized):
        count = step.item()
    number = isinstance(count, (int, float)) and 0 <= count <= LAST_STEP
    if not number or count != int(count):
        raise ValueError(f"{name}={step!r:.80}: must be a whole number of at least 0")
    return float(count)


def as_step(count: int) -> float:
    """The count that stands for ``count`` steps; after the last count they start again at 0."""
    count %= LAST + 1
    if count < END:
        return float(count)
    step: float = struct.unpack("<f", struct.pack("<i", count + OFFSET))[0]
    return step


def advance(
    counters: list[Tensor], plainly: bool, largest: float = inf, one: Tensor | None = None
) -> None:
    """Add a step to tensors of step counts, in place and without reading them.

    Args:
        counters: float32.
        plainly: count as ``torch.optim`` does, because the counts do not key random numbers.
        largest: an upper bound of the counts; infinite if only the device knows them.
        one: 1, or 0 for a step that does not count; 0-d, on the device of the counts.
    """
    # a list: the host would read a single tensor
    ones = None if one is None else [one] * len(counters)
    if plainly or largest < END:
        if ones is None:
            torch._foreach_add_(counters, 1.0)
        else:
            torch._foreach_add_(counters, ones)
        return
    more = list(torch._foreach_mul(counters, TO_NEXT))
    torch._foreach_clamp_min_(more, 1.0)
    if ones is not None:
        torch._foreach_mul_(more, ones)
    torch._foreach_add_(counters, more)


def counted(counters: list[Tensor], plainly: bool) -> list[float]:
    """Add a step to counts on the host, as ``advance`` does, and return the new counts."""
    before = [float(step) for step in counters]
    largest = max(before)
    advance(counters, plainly, largest)
    # reading tensors takes longer than everything else here
    return [step + 1 for step in before] if largest < END else [float(step) for step in counters]


def take_back(step: Tensor, plainly: bool, skipped: Tensor | None = None) -> None:
    """Undo ``advance`` on one count, in place, unless ``skipped``, a 0-d flag, is set."""
    before = step - 1
    if not plainly:
        before = torch.where(step > END, torch.nextafter(step, torch.zeros_like(step)), before)
    step.copy_(before if skipped is None else torch.where(skipped, step, before))
