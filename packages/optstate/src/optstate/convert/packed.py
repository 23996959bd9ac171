"""Packed state dicts of the family without their optimizer: shapes, rules, and decoding."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs import CodedOptimizer, Format, Rule, parse_format, rules
from optstate_codecs.writes import CORRECTION

StateDict = dict[str, Any]
Shapes = dict[Any, tuple[int, ...]]
BF16_NAMES = ("ema", "ema_squared", "max_ema_squared")
FLAGS = ("foreach", "fused", "capturable", "differentiable")
CORRECTION_WRITES = {torch.int8: "split24", torch.int16: "split32"}


def formats_of(group: Mapping[str, Any]) -> dict[str, Format]:
    """The format of each moment of a saved group."""
    return {name: parse_format(text) for name, text in group["formats"].items()}


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The rule whose moments a saved group has.

    Raises:
        ValueError: there is none.
    """
    names = set(group["formats"])
    if names in ({"exp_avg", "exp_avg_sq"}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}):
        return rules.Adam(decoupled=True)
    if names == {"ema", "ema_squared", "smoothing"}:
        return rules.LPFAdamW()
    if names == {"ema", "ema_squared"} and "amp_fac" in group:
        return rules.Compass()
    if names in (set(BF16_NAMES[:2]), set(BF16_NAMES)):
        return rules.Adam(decoupled=True, names=BF16_NAMES)
    found: dict[frozenset[str], Rule] = {
        frozenset({"exp_avg"}): rules.Lion(),
        frozenset({"momentum_buffer"}): rules.SGD(),
        frozenset(): rules.SGD(),
        frozenset({"ema_squared"}): rules.RMSProp(),
    }
    if frozenset(names) not in found:
        raise ValueError(f"moments {sorted(names)}: no rule of the family has these")
    return found[frozenset(names)]


def shape_of(entry: Mapping[str, Any], formats: Mapping[str, Format]) -> tuple[int, ...] | None:
    """The parameter's shape, from the state that is stored for it; None if that does not tell.

    Codes that share bytes have the parameter's leading dimensions unless its last one is odd, and
    then they have one dimension alone.
    """
    if isinstance(entry.get(CORRECTION), Tensor):
        return tuple(entry[CORRECTION].shape)
    inferred = None
    for name, format_ in formats.items():
        if isinstance(entry.get(name), Tensor):
            return tuple(entry[name].shape)
        for component in format_.components:
            part = entry.get(component.key(name))
            if not isinstance(part, Tensor) or component.entries is not None:
                continue
            if component.per_element:
                return tuple(part.shape)
            if part.dim() > 1:
                last = part.shape[-1] // component.shared * component.span
                inferred = (*part.shape[:-1], last)
    return inferred


def known_shapes(state_dict: StateDict, given: Shapes) -> Shapes:
    """The shape of every parameter that has state.

    Args:
        state_dict: packed.
        given: shapes that are known, by number.

    Raises:
        ValueError: a shape is neither given nor in the state.
    """
    found: Shapes = {}
    for group in state_dict["param_groups"]:
        for number in group["params"]:
            entry = state_dict["state"].get(number)
            if number in given:
                found[number] = tuple(given[number])
            elif entry:
                shape = shape_of(entry, formats_of(group))
                if shape is None:
                    raise ValueError(
                        f"parameter {number!r}: its codes do not tell its shape; name the model"
                        " with --shapes"
                    )
                found[number] = shape
    return found


def param_groups(state_dict: StateDict, shapes: Shapes) -> Iterator[StateDict]:
    """Param groups with parameters of these shapes, whose values are not set.

    A parameter without state is empty. One with a correction is bfloat16, others are float32.
    """
    for group in state_dict["param_groups"]:
        params = []
        for number in group["params"]:
            entry = state_dict["state"].get(number) or {}
            dtype = torch.bfloat16 if CORRECTION in entry else torch.float32
            shape = shapes.get(number, (0,))
            params.append(Parameter(torch.empty(shape, dtype=dtype, device="cpu")))
        yield {"params": params}


def write_of(state_dict: StateDict) -> str:
    """The parameter write that keeps the corrections in the state, or "nearest"."""
    for entry in state_dict["state"].values():
        if isinstance(entry, Mapping) and CORRECTION in entry:
            return CORRECTION_WRITES[entry[CORRECTION].dtype]
    return "nearest"


def decoded(state_dict: StateDict, shapes: Shapes) -> tuple[StateDict, Rule]:
    """A packed state dict in the layout of ``torch.optim``, in float32, and its rule.

    Raises:
        KeyError, TypeError, ValueError: an entry does not fit; the message names it.
    """
    saved = state_dict["param_groups"]
    rule = rule_of(saved[0])
    groups = [
        {**made, "formats": group["formats"]} | {k: group[k] for k in rule.defaults() if k in group}
        for made, group in zip(param_groups(state_dict, shapes), saved, strict=True)
    ]
    optimizer = CodedOptimizer(groups, rule, saved[0]["formats"], write=write_of(state_dict))
    optimizer.load_state_dict(state_dict)
    full = optimizer.full_state_dict()
    kept = {*rule.defaults(), *FLAGS, "params", "param_names"}
    full["param_groups"] = [
        {key: value for key, value in group.items() if key in kept}
        for group in full["param_groups"]
    ]
    return full, rule
