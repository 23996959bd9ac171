"""Gradient norms, and the factor that unscales and clips gradients inside a step.

Both are one factor, so a kernel launch reads every gradient once and rewrites none. The host reads
none of these values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.sharding import any_distributed, is_distributed, reduced, sharding_groups

__all__ = [
    "Share",
    "clip_factor",
    "gradient_factor",
    "gradient_norm",
    "nonfinite",
    "norm_of",
    "share",
]

# a gradient's part in the norm of all: the device and dtype it is summed by, and its own norm
Share = tuple[tuple[torch.device, torch.dtype], Tensor]


def gradient_factor(
    grads: Sequence[Tensor],
    grad_scale: Tensor | None,
    max_norm: float | None,
    params: Sequence[Tensor] = (),
) -> tuple[Tensor | None, Tensor | None]:
    """The factor for all gradients, and their norm.

    Args:
        grads: at least one.
        grad_scale: divides them first, or None.
        max_norm: clips the norm of all of them together then, or None.
        params: their parameters; of DTensors, ``grads`` are the local shards.

    Returns:
        The factor, or None for 1, and the norm of the unscaled gradients, or None without
        ``max_norm``; 0-d. With ``max_norm`` the factor is that of
        ``torch.nn.utils.clip_grad_norm_``: a NaN norm makes it NaN, an infinite one 0.
    """
    inverse = None if grad_scale is None else grad_scale.reciprocal()
    if max_norm is None:
        return inverse, None
    norm = gradient_norm(grads, params)
    if inverse is not None:
        inverse = inverse.to(norm.device, norm.dtype)
        norm = norm * inverse
    clip = clip_factor(norm, max_norm)
    return (clip if inverse is None else inverse * clip), norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """The factor by which ``torch.nn.utils.clip_grad_norm_`` scales gradients of this norm."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def gradient_norm(grads: Sequence[Tensor], params: Sequence[Tensor] = ()) -> Tensor:
    """The 2-norm of all of ``grads`` together, 0-d, on the device of the first.

    It equals ``torch.nn.utils.get_total_norm``, but has at least float32 precision. If any of
    ``params`` is a DTensor, all shards count, and every worker must call this.
    """
    if any_distributed(params):
        members = _by_groups(grads, params)
        squares = {groups: gradient_norm(some).square() for groups, some in members.items()}
        return reduced(squares, largest=False).sqrt()
    norm: Tensor = torch.linalg.vector_norm(_norms(grads, 2.0), 2.0)
    return norm


def share(index: int, grad: Tensor, double: bool) -> Share:
    """The input to ``norm_of`` from a gradient that is about to be freed.

    Args:
        index: of its parameter, for the message.
        grad: the gradient.
        double: whether any of all gradients is float64.

    Raises:
        TypeError: it is a DTensor, so that only a shard of it is here.
    """
    if is_distributed(grad):
        raise TypeError(
            f"max_grad_norm: gradient {index} is a DTensor, whose norm needs all its shards; "
            "step without GradientRelease, after torch.nn.utils.clip_grad_norm_"
        )
    return (grad.device, grad.dtype), _norms([grad], 2.0, double)


def norm_of(shares: Iterable[Share]) -> Tensor:
    """``gradient_norm`` from the shares of gradients in the same order; bitwise equal."""
    together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for kind, norm in shares:
        together.setdefault(kind, []).append(norm)
    device = next(iter(together))[0]
    norms = [norm.to(device) for members in together.values() for norm in members]
    total: Tensor = torch.linalg.vector_norm(torch.cat(norms), 2.0)
    return total


def _by_groups(
    grads: Sequence[Tensor], params: Sequence[Tensor]
) -> dict[tuple[Any, ...], list[Tensor]]:
    """The gradients by the process groups that hold the shards of their parameters."""
    members: dict[tuple[Any, ...], list[Tensor]] = {}
    for grad, param in zip(grads, params, strict=True):
        members.setdefault(sharding_groups(param), []).append(grad)
    return members


def nonfinite(
    grads: Sequence[Tensor], params: Sequence[Tensor] = (), found: Tensor | None = None
) -> Tensor:
    """1.0 if any element of ``grads`` is NaN or infinite, else 0.0; 0-d float32.

    Elements on meta, which have no values, count as finite. If any of ``params`` is a DTensor, all
    shards count, and every worker must call this. What was ``found`` before is added.
    """
    if found is not None:
        new = nonfinite(grads, params)
        return new + found.to(new.device)
    if any_distributed(params):
        members = _by_groups(grads, params)
        return reduced({g: nonfinite(some) for g, some in members.items()}, largest=True)
    # there is no maximum over nothing
    some = [grad for grad in grads if grad.numel() and not grad.is_meta]
    if not some:
        device = "cpu" if grads[0].is_meta else grads[0].device
        return torch.zeros((), dtype=torch.float32, device=device)
    return (~torch.isfinite(_norms(some, math.inf)).all()).to(torch.float32)


def _norms(grads: Sequence[Tensor], order: float, double: bool = False) -> Tensor:
    """The norm of each gradient, all on the device of the first."""
    together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        together.setdefault((grad.device, grad.dtype), []).append(grad)
    double = double or any(dtype == torch.float64 for _, dtype in together)
    wide = torch.float64 if double else torch.float32
    device = grads[0].device
    found: list[Tensor] = []
    for members in together.values():
        found += (norm.to(device) for norm in torch._foreach_norm(members, order, wide))
    return torch.stack(found)
