"""Gradient centralization (Yong et al., arXiv:2004.01461, equation 1).

From the gradient of a tensor with two dimensions or more, its mean over all dimensions but the
first is subtracted, or a share of it. Only the means are made beforehand, one number for each index
of the first dimension; a step subtracts them from what it reads, so that no gradient is rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optstate_codecs.engine.request import GradMeans
from optstate_codecs.state.layout import is_dense, storage_order
from optstate_codecs.triton_lib import kernels_run

__all__ = ["centre_shape", "find_centres"]


def find_centres(grads: Sequence[Tensor], shares: Sequence[float]) -> GradMeans | None:
    """What to subtract from ``grads`` for the ``shares`` of their means; None for nothing."""
    places, ends = [], dict[torch.device, int]()
    for grad, share in zip(grads, shares, strict=True):
        centred = share != 0 and grad.dim() > 1 and grad.numel() > 0
        places.append(ends.get(grad.device, 0) if centred else -1)
        if centred:
            ends[grad.device] = places[-1] + grad.shape[0]
    if not ends:
        return None
    values = {
        device: torch.empty(end, dtype=torch.float32, device=device) for device, end in ends.items()
    }
    launches: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, (grad, place) in enumerate(zip(grads, places, strict=True)):
        if place >= 0 and _kernel_takes(grad):
            launches.setdefault((grad.device, grad.dtype), []).append(number)
        elif place >= 0:
            wide = torch.promote_types(grad.dtype, torch.float32)
            mean = grad.mean(tuple(range(1, grad.dim())), dtype=wide) * shares[number]
            values[grad.device][place : place + len(mean)] = mean
    for (device, _), numbers in launches.items():
        # imported with the first launch, so that CPU users never load triton
        from optstate_codecs.engine.triton.means import launch

        launch(
            [grads[number] for number in numbers],
            [places[number] for number in numbers],
            [shares[number] for number in numbers],
            values[device],
        )
    return GradMeans(values, places)


def _kernel_takes(grad: Tensor) -> bool:
    """Whether the rows of ``grad`` are dense and follow each other, where the kernel runs."""
    return (
        kernels_run(grad.device)
        and grad.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and storage_order(grad)[0] == 0
        and is_dense(grad)
    )


def centre_shape(tensor: Tensor) -> tuple[int, int]:
    """Of the elements of ``tensor`` in storage order, number e has the first index e // a % b.

    Returns:
        a and b.
    """
    order = storage_order(tensor)
    inside = order[order.index(0) + 1 :]
    return torch.Size([tensor.shape[d] for d in inside]).numel(), tensor.shape[0]
