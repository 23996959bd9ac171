"""Gradient centralization (Yong et al., arXiv:2004.01461, equation 1).

It subtracts from a gradient of two dimensions or more its mean over all dimensions but the first,
or a share of it. Only the means are computed here, one for each index of the first dimension. The
step subtracts them as it reads the gradients, so that no gradient is rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.request import GradMeans
from optstate_codecs.plain import plain_value
from optstate_codecs.sharding import check_whole_rows
from optstate_codecs.state.layout import is_dense, storage_order
from optstate_codecs.triton_lib import kernels_run

__all__ = ["centralization_means", "find_grad_means", "mean_layout"]


def centralization_means(
    groups: Sequence[Mapping[str, Any]],
    numbers: Sequence[int],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> GradMeans | None:
    """The means that the groups' option ``centralization`` subtracts; None if it subtracts none.

    Args:
        groups: of the optimizer.
        numbers: the number of each parameter's group.
        params: the parameters.
        grads: their gradients; of DTensors the local shards.

    Raises:
        ValueError: the rows of a DTensor are sharded.
    """
    shares = [plain_value(group["centralization"]) for group in groups]
    if not any(shares):
        return None
    check_whole_rows("centralization", params)
    return find_grad_means(grads, [shares[number] for number in numbers])


def find_grad_means(grads: Sequence[Tensor], shares: Sequence[float]) -> GradMeans | None:
    """The means of ``grads`` times their ``shares``; None where no gradient is centralized."""
    starts, ends = [], dict[torch.device, int]()
    for grad, share in zip(grads, shares, strict=True):
        centralized = share != 0 and grad.dim() > 1 and grad.numel() > 0
        starts.append(ends.get(grad.device, 0) if centralized else -1)
        if centralized:
            ends[grad.device] = starts[-1] + grad.shape[0]
    if not ends:
        return None
    values = {
        device: torch.empty(end, dtype=torch.float32, device=device) for device, end in ends.items()
    }
    launches: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, (grad, start) in enumerate(zip(grads, starts, strict=True)):
        if start >= 0 and _kernel_takes(grad):
            launches.setdefault((grad.device, grad.dtype), []).append(number)
        elif start >= 0:
            wide = torch.promote_types(grad.dtype, torch.float32)
            mean = grad.mean(tuple(range(1, grad.dim())), dtype=wide) * shares[number]
            values[grad.device][start : start + len(mean)] = mean
    for (device, _), numbers in launches.items():
        # imported with the first launch, so that CPU users never import the kernel
        from optstate_codecs.engine.triton.means import launch

        launch(
            [grads[number] for number in numbers],
            [starts[number] for number in numbers],
            [shares[number] for number in numbers],
            values[device],
        )
    return GradMeans(values, starts)


def _kernel_takes(grad: Tensor) -> bool:
    """Whether the kernel runs there, and ``grad`` is dense with its first dimension outermost."""
    return (
        kernels_run(grad.device)
        and grad.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and storage_order(grad)[0] == 0
        and is_dense(grad)
    )


def mean_layout(tensor: Tensor) -> tuple[int, int]:
    """Numbers a and b: element e of ``tensor``, in storage order, has mean number e // a % b."""
    order = storage_order(tensor)
    inside = order[order.index(0) + 1 :]
    return torch.Size([tensor.shape[d] for d in inside]).numel(), tensor.shape[0]
