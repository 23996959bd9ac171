"""Checks for steps of some parameters before the gradients of the others are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["PartOptimizer", "check_member", "refuse_parts", "step_one"]

Groups = Sequence[Mapping[str, Any]]


def refuse_parts(skip_nonfinite: bool, max_grad_norm: float | None, by: str, advice: str) -> None:
    """Raise if an option needs all gradients before the first parameter is stepped.

    Args:
        skip_nonfinite: of the optimizer.
        max_grad_norm: of the optimizer.
        by: names the caller.
        advice: says how to clip instead.

    Raises:
        ValueError: an option does; the message names it.
    """
    if skip_nonfinite:
        raise ValueError(
            f"skip_nonfinite=True: cannot be combined with {by}, which has stepped parameters "
            "before the last gradient is known; use skip_nonfinite=False"
        )
    if max_grad_norm is not None:
        raise ValueError(f"max_grad_norm={max_grad_norm}: must be None under {by}, {advice}")


def check_member(
    groups: Groups, param: Tensor, group: Mapping[str, Any] | None, index: int | None
) -> None:
    """Raise unless ``group`` is one of ``groups``, and ``param`` its parameter ``index``.

    Args:
        groups: of the optimizer.
        param: the parameter.
        group: None: not checked.
        index: the position in ``group``; None: not checked.

    Raises:
        ValueError: they do not belong together; the message names the argument.
    """
    if group is None:
        if index is not None:
            raise ValueError(f"index={index}: is a position in group, must be None without one")
        return
    if not any(group is member for member in groups):
        raise ValueError(
            f"group: a dict with keys {', '.join(map(str, group))}: must be one of the "
            f"{len(groups)} in optimizer.param_groups"
        )
    members = group["params"]
    if index is None:
        if not any(param is member for member in members):
            raise ValueError(f"group: param of shape {tuple(param.shape)} is not in it")
    elif not 0 <= index < len(members) or members[index] is not param:
        raise ValueError(
            f"index={index}: must be the position of param in group, which has {len(members)}"
        )


class PartOptimizer(Protocol):
    """The members of ``CodedOptimizer`` that ``step_one`` uses."""

    param_groups: list[dict[str, Any]]
    skip_nonfinite: bool
    max_grad_norm: float | None
    steps_in_parts: bool

    def group_of(self, param: Tensor) -> dict[str, Any]: ...
    def step_part(
        self, params: Sequence[Tensor], factor: Tensor | None = None, last: bool = False
    ) -> None: ...


def step_one(
    optimizer: PartOptimizer, param: Tensor, group: Mapping[str, Any] | None, index: int | None
) -> None:
    """Step one parameter with its gradient; ``CodedOptimizer.step_parameter`` documents it."""
    advice = "which does not know the other gradients; use GradientRelease, which clips"
    options = optimizer.skip_nonfinite, optimizer.max_grad_norm
    refuse_parts(*options, "step_parameter", advice)
    if optimizer.steps_in_parts:
        raise RuntimeError(
            "step_parameter: cannot be combined with GradientRelease, which steps every parameter "
            "itself; detach() it"
        )
    check_member(optimizer.param_groups, param, group, index)
    if group is None:
        optimizer.group_of(param)
    if param.grad is None:
        return
    optimizer.step_part([param], last=True)
    # autograd does not see kernels write: a later use of the old value in backward must raise
    torch.autograd.graph.increment_version(param)
