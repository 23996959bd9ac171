"""Checks that raise for uses that gradient release does not support; see ``release``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.sharding import is_distributed

__all__ = [
    "Values",
    "check_reduced",
    "check_step_call",
    "check_unchanged",
    "scaler_error",
    "values_of",
]

# values of the groups besides parameters, by group and key; for a tensor its identity and version
Values = dict[tuple[int, str], Any]


def check_reduced(params: Sequence[Tensor]) -> None:
    """Raise if several workers have gradients of these parameters that are not reduced yet."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() > 1 and not all(map(is_distributed, params)):
        raise ValueError(
            "allow_distributed=False: torch.distributed has several workers, and unsharded "
            "parameters would be stepped before their gradients are reduced; pass True only where "
            "nothing reduces them"
        )


def check_step_call(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if ``step`` was called by a scaler or with a closure."""
    # removed, since the scaler leaves them there after an exception
    scaled = [vars(optimizer).pop(name, None) for name in ("grad_scale", "found_inf")]
    if any(value is not None for value in scaled):
        raise scaler_error()
    if any(value is not None for value in (*args, *kwargs.values())):
        raise ValueError("closure: must be None under GradientRelease; call backward before")


def scaler_error() -> RuntimeError:
    """The error for gradients that are still scaled when they are stepped."""
    return RuntimeError(
        "GradScaler: cannot be combined with GradientRelease, which has stepped with scaled "
        "gradients; train in bfloat16 or float32 without a scaler"
    )


def values_of(optimizer: Optimizer) -> Values:
    """The present values of the groups."""
    return {
        (number, key): (id(value), value._version) if isinstance(value, Tensor) else value
        for number, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params"
    }


def check_unchanged(before: Values, now: Values) -> None:
    """Raise if a value has changed between two parts of a step."""
    for (number, key), value in before.items():
        if now.get((number, key)) != value:
            raise RuntimeError(
                f"param_groups[{number}][{key!r}]: has changed since parameters were stepped with "
                "it in this backward; change it between step() and the next backward"
            )
