"""Other libraries' Adam states in the layout of ``torch.optim``, which every optimizer loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.state.moments import without_underflow

__all__ = ["adam_state_dict"]

GROUP_KEYS = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")

# number of a parameter, what is stored for it, and its group
Decode = Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Mapping[str, Tensor]]


def adam_state_dict(state_dict: Mapping[str, Any], decode: Decode) -> dict[str, Any]:
    """A state dict of a library's Adam in the layout of ``torch.optim.AdamW``.

    Args:
        state_dict: ``state`` by parameter number, with a ``step`` each, and ``param_groups``.
        decode: given a parameter's number, what is stored for it, and its group: its moments by
            torch's names, float32, of its shape.

    Returns:
        A new state dict. Where a second moment is zero beside a first moment that is not, it is
        the square of that, see ``moments.without_underflow``.

    Raises:
        KeyError: an entry is missing; the message names it.

    Example:
        >>> adam_state_dict(theirs, lambda number, stored, group: their_decode(stored))
    """
    group_of = {n: group for group in state_dict["param_groups"] for n in group["params"]}
    state = {}
    for number, stored in state_dict["state"].items():
        if not stored:
            continue
        if "step" not in stored:
            raise KeyError(f"state_dict['state'][{number!r}]: missing key 'step'")
        moments = dict(decode(number, stored, group_of[number]))
        # codes lose small ones, and dividing by zero would be a long step
        moments["exp_avg_sq"] = without_underflow(moments["exp_avg_sq"], moments["exp_avg"])
        step = torch.tensor(float(stored["step"]), dtype=torch.float32, device="cpu")
        state[number] = {"step": step, **moments}
    groups = []
    for group in state_dict["param_groups"]:
        kept = {key: group[key] for key in GROUP_KEYS if key in group}
        if isinstance(kept.get("lr"), Tensor):
            kept["lr"] = float(kept["lr"])
        groups.append(kept)
    return {"state": state, "param_groups": groups}
