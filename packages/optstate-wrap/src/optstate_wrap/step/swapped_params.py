"""A context that replaces some parameters of an optimizer, with their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["swapped_params"]


@contextmanager
def swapped_params(inner: Optimizer, by: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, the keys of ``by`` are replaced by its values in the groups and in the state.

    A state dict may be loaded inside, which makes new groups with equally many parameters.
    """
    lists = [group["params"] for group in inner.param_groups]
    _rekey(inner, by)
    for group, params in zip(inner.param_groups, lists, strict=True):
        group["params"] = [by.get(param, param) for param in params]
    try:
        yield
    finally:
        for group, params in zip(inner.param_groups, lists, strict=True):
            group["params"] = params
        _rekey(inner, {other: param for param, other in by.items()})


def _rekey(inner: Optimizer, by: Mapping[Tensor, Tensor]) -> None:
    state = inner.state
    for old, new in by.items():
        if old in state:
            state[new] = state.pop(old)
