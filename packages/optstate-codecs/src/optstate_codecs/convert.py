"""Converts Adam states of other libraries to ``torch.optim``'s layout, for any optimizer here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.state.moments import without_underflow
from optstate_codecs.state.structure import check_structure, malformed

__all__ = ["adam_state_dict"]

GROUP_KEYS = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")

# number of a parameter, its stored state, and its group
Decode = Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Mapping[str, Tensor]]


def adam_state_dict(state_dict: Mapping[str, Any], decode: Decode) -> dict[str, Any]:
    """A state dict of a library's Adam in the layout of ``torch.optim.AdamW``.

    Args:
        state_dict: ``state`` by parameter number, with a ``step`` each, and ``param_groups``.
        decode: returns a parameter's moments by torch's names, float32, of its shape; its
            arguments are the parameter's number, stored state and group.

    Returns:
        A new state dict. A second moment that is zero while the first one is not becomes the
        square of the first, see ``moments.without_underflow``.

    Raises:
        KeyError: an entry is missing; the message names it.
        TypeError, ValueError: an entry is of another type, or wrong.

    Examples:
        >>> adam_state_dict(theirs, lambda number, stored, group: their_decode(stored))
    """
    check_structure(state_dict)
    with malformed("state_dict"):
        return _converted(state_dict, decode)


def _converted(state_dict: Mapping[str, Any], decode: Decode) -> dict[str, Any]:
    group_of = {n: group for group in state_dict["param_groups"] for n in group["params"]}
    state = {}
    for number, stored in state_dict["state"].items():
        if not stored:
            continue
        if "step" not in stored:
            raise KeyError(f"state_dict['state'][{number!r}]: missing key 'step'")
        if number not in group_of:
            raise KeyError(f"state_dict['state'][{number!r}]: is in no group")
        moments = dict(decode(number, stored, group_of[number]))
        # codes round small ones to zero, and dividing by zero would give a long step
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
