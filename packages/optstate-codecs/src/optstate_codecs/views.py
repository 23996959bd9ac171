"""Reads decoded moments and master weights of an optimizer, in plain numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.sharding import is_distributed, local_of, rewrapped
from optstate_codecs.state.building import decode_param_step
from optstate_codecs.state.shards import as_owner
from optstate_codecs.writes import MASTER, parameter_write

__all__ = ["decode_state", "master_weights"]


def decode_state(optimizer: CodedOptimizer, param: Tensor) -> dict[str, Tensor]:
    """The state of one parameter in plain numbers.

    Args:
        optimizer: any optimizer of the family.
        param: one of its parameters.

    Returns:
        ``step`` (0-d) and every moment in float32 with the parameter's shape; copies. Empty for a
        parameter that has not been stepped. Moments of a ``DTensor`` are ``DTensor``s.

    Raises:
        KeyError: the parameter is not the optimizer's.

    Example:
        >>> decode_state(optimizer, model.weight)["exp_avg"].norm()
    """
    optimizer.group_of(param)
    found = optimizer.stored_param_steps({param}) if optimizer.state.get(param) else []
    return as_owner(decode_param_step(*found), param) if found else {}


def master_weights(optimizer: CodedOptimizer, param: Tensor) -> Tensor:
    """The weights that training continues from: a parameter plus its stored rounding error.

    Args:
        optimizer: any optimizer of the family.
        param: one of its parameters.

    Returns:
        float32 (float64 for float64 parameters), of the parameter's shape; a copy. It equals the
        parameter if the optimizer stores no rounding error.

    Raises:
        KeyError: the parameter is not the optimizer's.

    Example:
        >>> fp32_weights = master_weights(optimizer, model.weight)
    """
    optimizer.group_of(param)
    state = optimizer.state.get(param, {})
    write = parameter_write(optimizer.write, param.dtype)
    value = local_of(param).detach()
    parts = [state[c.key(MASTER)] for c in write.components if state]
    if parts:
        value = write.read(value, parts)
    value = value.to(torch.promote_types(param.dtype, torch.float32), copy=True)
    return rewrapped(value, param, param.shape) if is_distributed(param) else value
