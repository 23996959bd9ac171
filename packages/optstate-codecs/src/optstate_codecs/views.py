"""Reads decoded moments and master weights of an optimizer, in plain numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.sharding import local_of, placed_like
from optstate_codecs.state.building import decode_param_step
from optstate_codecs.state.shards import as_owner
from optstate_codecs.writes import MASTER, parameter_write

__all__ = ["decode_state", "master_state_dict", "master_weights"]


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

    Examples:
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

    Examples:
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
    return placed_like(value, param)


def master_state_dict(
    optimizer: CodedOptimizer,
    model: torch.nn.Module,
    *,
    tied: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """The state dict of a model with the ``master_weights`` of the parameters of an optimizer.

    Args:
        optimizer: any optimizer of the family.
        model: has parameters of the optimizer, under any names.
        tied: whether a parameter that the model has under several names is there under each of
            them, as ``model.load_state_dict`` expects; otherwise it is there once, under the first,
            as ``safetensors.torch.save_file`` expects.
        device: for instance "cpu", to which the tensors go one by one; None: where they are.

    Returns:
        As ``model.state_dict()``. Parameters of the optimizer in float16 and bfloat16 are in
        float32, and they and those in float32 and float64 are copies. Everything else, buffers and
        parameters that the optimizer does not have, is as in the model, whose memory it shares
        unless it was moved. ``DTensor``s stay ``DTensor``s.

    Raises:
        ValueError: the model has no parameter of the optimizer.

    Examples:
        >>> save_file(master_state_dict(optimizer, model, device="cpu"), "model.safetensors")
    """
    own = {param for group in optimizer.param_groups for param in group["params"]}
    entries = model.state_dict(keep_vars=True)
    if not any(isinstance(value, Tensor) and value in own for value in entries.values()):
        raise ValueError(
            f"model={type(model).__name__}: has none of the optimizer's {len(own)} parameters"
        )
    found: dict[str, Any] = {}
    made: dict[Tensor, Tensor] = {}
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            found[name] = value
        elif value not in made:
            new = master_weights(optimizer, value) if value in own else value.detach()
            found[name] = made[value] = _moved(new, device)
        elif tied:
            found[name] = made[value]
    return found


def _moved(value: Tensor, device: torch.device | str | None) -> Tensor:
    if device is None:
        return value
    return placed_like(local_of(value).to(device), value)
