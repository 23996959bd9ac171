"""Gradient centralization (Yong et al., arXiv:2004.01461, equation 1).

From the gradient of a tensor with two dimensions or more, its mean over all dimensions but the
first is subtracted, or a share of it. Only the means are made beforehand, one number for each index
of the first dimension; a step subtracts them from what it reads, so that no gradient is rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optstate_codecs.layout import storage_order

__all__ = ["Centres", "centre_shape", "find_centres"]


@dataclass(frozen=True)
class Centres:
    """What is to be subtracted from the gradients of a step.

    Attributes:
        values: on each device one row of numbers, float32.
        places: where a gradient's numbers begin in its device's row; -1 where it has none.
    """

    values: dict[torch.device, Tensor]
    places: Sequence[int]

    def of(self, place: int, grad: Tensor) -> Tensor | None:
        """What to subtract from each element of ``grad``, if anything is."""
        start = self.places[place]
        if start < 0:
            return None
        numbers = self.values[grad.device][start : start + grad.shape[0]]
        return numbers.view(-1, *[1] * (grad.dim() - 1)).expand_as(grad)


def find_centres(grads: Sequence[Tensor], shares: Sequence[float]) -> Centres | None:
    """What to subtract from ``grads`` for the ``shares`` of their means; None for nothing."""
    found: dict[torch.device, list[Tensor]] = {}
    ends: dict[torch.device, int] = {}
    places = []
    for grad, share in zip(grads, shares, strict=True):
        if share == 0 or grad.dim() < 2 or not grad.numel():
            places.append(-1)
            continue
        others = tuple(range(1, grad.dim()))
        wide = torch.promote_types(grad.dtype, torch.float32)
        mean = grad.mean(others, dtype=wide).mul_(share).to(torch.float32)
        places.append(ends.get(grad.device, 0))
        ends[grad.device] = places[-1] + len(mean)
        found.setdefault(grad.device, []).append(mean)
    if not found:
        return None
    return Centres({device: torch.cat(means) for device, means in found.items()}, places)


def centre_shape(tensor: Tensor) -> tuple[int, int]:
    """Of the elements of ``tensor`` in storage order, number e has the first index e // a % b.

    Returns:
        a and b.
    """
    order = storage_order(tensor)
    inside = order[order.index(0) + 1 :]
    return torch.Size([tensor.shape[d] for d in inside]).numel(), tensor.shape[0]
