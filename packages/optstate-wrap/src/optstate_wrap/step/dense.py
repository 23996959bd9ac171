"""Makes tensors dense and gives them one memory order, as torch's fused steps need them.

Those steps read the parameter, its gradient and its state as contiguous memory and ignore strides.
With a parameter that has gaps, the CPU's step writes outside of it, and the GPU's raises.
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
    """Whether two tensors of one shape have equal strides in all dimensions longer than 1."""
    if tensor.stride() == like.stride():
        return True
    of = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    return all(size <= 1 or a == b for size, a, b in of)


def with_strides_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, or a copy of it, with the strides of ``like``, which is dense."""
    if same_strides(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@contextmanager
def dense_for_fused(inner: Optimizer) -> Iterator[None]:
    """Inside, parameters in groups with ``fused=True`` are dense and have one memory order.

    Parameters with gaps are replaced by copies, whose values they receive afterwards. Gradients are
    replaced inside only. State keeps the new memory order.
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
            _restride_state(inner, param, stepped)
        with swapped_params(inner, copies):
            yield
        for param, copy in copies.items():
            param.detach().copy_(copy.detach())
    finally:
        for stepped, before in grads:
            stepped.grad = before


def _contiguous(param: Tensor, states: Mapping[Any, Mapping[str, Any]]) -> bool:
    """Whether a parameter needs nothing, which is the usual case and has to be fast."""
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
    """Whether a tensor has strides of its own: it is neither sparse nor sharded."""
    if type(tensor) not in (Tensor, Parameter) and hasattr(tensor, "to_local"):
        return False
    return tensor.layout is torch.strided


def _restride_state(inner: Optimizer, param: Tensor, like: Tensor) -> None:
    state = inner.state.get(param, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == like.shape and _plain(value):
            state[key] = with_strides_of(value, like)
