"""Flat parameters of FSDP1 (``FullyShardedDataParallel``), whose packed state cannot be gathered.

A step treats a worker's part of a flat parameter like any other tensor, and the packed state is
that worker's own. ``FullyShardedDataParallel.optim_state_dict`` gathers state element by element;
with codes and scales it fails inside a collective. Decoded state can be gathered.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["check_not_gathered", "is_flat"]

# callers of ``state_dict`` that gather it: functions of FSDP1, and of distributed checkpoints
GATHERERS = {
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "optim_state_dict"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "full_optim_state_dict"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "sharded_optim_state_dict"),
    ("torch.distributed.checkpoint.state_dict", "_get_optim_state_dict"),
}
WAYS = (
    "FSDP1 cannot gather packed state: give it the decoded state, "
    "FullyShardedDataParallel.optim_state_dict(model, optimizer, optimizer.full_state_dict()); or "
    "have each worker save its own optimizer.state_dict(), for as many workers; or use FSDP2 "
    "(fully_shard)"
)


def is_flat(param: Tensor) -> bool:
    """Whether ``param`` is a worker's part of a flat parameter of FSDP1, or a view of one."""
    return bool(getattr(param, "_fsdp_flattened", False))


def check_not_gathered(optimizer: Optimizer) -> None:
    """Raise if FSDP1 is about to gather an optimizer's packed state; warn once if it might.

    FSDP1 calls ``state_dict`` like anybody else, so this inspects the stack if parameters are flat.

    Raises:
        RuntimeError: on every worker, before any collective; the message names alternatives.
    """
    flat = any(is_flat(param) for group in optimizer.param_groups for param in group["params"])
    if not flat or not optimizer.state:
        return
    if _is_gathered():
        raise RuntimeError(f"optim_state_dict: {WAYS}")
    if not vars(optimizer).get("_warned_of_gathering"):
        vars(optimizer)["_warned_of_gathering"] = True
        warnings.warn(f"state_dict: is of this worker's shards only. {WAYS}", stacklevel=3)


def _is_gathered() -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) in GATHERERS:
            return True
        frame = frame.f_back
    return False
