"""Tensors as torch's fused steps need them: dense, and all of a parameter in one memory order.

Those steps walk the parameter, its gradient and its state as rows of memory and ignore strides. A
CPU's writes outside a parameter with gaps; a GPU's raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate_codecs import CodedOptimizer
from optstate_codecs.state.layout import is_dense
from optstate_wrap.step.swapped_params import swapped_params

__all__ = ["dense_for_fused", "same_strides", "with_strides_of"]


def same_strides(tensor: Tensor, like: Tensor) -> bool:
    """Whether two strided tensors of one shape have the same strides, where these mean anything."""
    if tensor.stride() == like.stride():
        return True
    of = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    return all(size <= 1 or a == b for size, a, b in of)


def with_strides_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor with the strides of ``like``, which is dense: itself, or a copy."""
    if same_strides(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@contextmanager
def dense_for_fused(inner: Optimizer) -> Iterator[None]:
    """Inside, what groups with ``fused=True`` step is dense and in one order.

    State stays as it was laid out for that. Gradients are what they were afterwards, and parameters
    with gaps receive what their copies became.
    """
    fused = [] if isinstance(inner, CodedOptimizer) else inner.param_groups
    params = [p for group in fused if group.get("fused") for p in group["params"]]
    params = list(dict.fromkeys(p for p in params if not _contiguous(p, inner.state)))
    copies: dict[Tensor, Tensor] = {}
    grads: list[tuple[Tensor, Tensor | None]] = []
    try:
        for param in params:
            if param.grad is None or not (_plain(param) and _plain(param.grad)):
                continue
            stepped = param
            if not is_dense(param):
                data = torch.empty_like(param.detach()).copy_(param.detach())
                stepped = copies[param] = Parameter(data, param.requires_grad)
            grad = with_strides_of(param.grad, stepped)
            if grad is not stepped.grad:
                grads.append((stepped, stepped.grad))
                stepped.grad = grad
            _lay_state(inner, param, stepped)
        with swapped_params(inner, copies):
            yield
        for param, copy in copies.items():
            param.detach().copy_(copy.detach())
    finally:
        for stepped, before in grads:
            stepped.grad = before


def _contiguous(param: Tensor, states: Mapping[Any, Mapping[str, Any]]) -> bool:
    """Whether there is nothing to do for a parameter, as nearly always: it is to cost little."""
    grad = param.grad
    if grad is None:
        return True
    if grad.layout is not torch.strided or not (grad.is_contiguous() and param.is_contiguous()):
        return False
    state = states.get(param)
    for value in state.values() if state else ():
        if isinstance(value, Tensor) and not value.is_contiguous():
            return False
    return True


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor has strides: it is neither sparse nor sharded."""
    if type(tensor) not in (Tensor, Parameter) and hasattr(tensor, "to_local"):
        return False
    return tensor.layout is torch.strided


def _lay_state(inner: Optimizer, param: Tensor, like: Tensor) -> None:
    state = inner.state.get(param, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == like.shape and _plain(value):
            state[key] = with_strides_of(value, like)
