"""Saves packed and full state dicts, and loads both, and those of ``torch.optim``.

A packed state dict has ``torch.optim``'s layout (``state`` by parameter number, ``param_groups``),
holds the stored components, and adds ``formats`` to each group: {moment: text of its format}.
Renaming parameters keeps all of that. Flattening keeps only the keys that a group has while it is
in use: the options that decide its formats are among them, and the order of dimensions that blocks
follow is an entry of the state (``dim_order``). Older checkpoints have no such entry; where codes
share bytes, their groups hold ``orders`` instead: {parameter number: order}.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.counts import checked_count, taken
from optstate_codecs.formats import FP32, Format, parse_format
from optstate_codecs.plain import plain_value
from optstate_codecs.rounding import Counter
from optstate_codecs.rounding_keys import rounding_keys
from optstate_codecs.sharding import is_distributed, local_of, shard_formats, shard_offset
from optstate_codecs.state.building import (
    counts_on_device,
    decode_param_step,
    decode_stored,
    encode_state,
    share_steps,
)
from optstate_codecs.state.components import (
    check_component,
    check_scales,
    check_tensor,
    components_of,
)
from optstate_codecs.state.conform import own_keys, renamed
from optstate_codecs.state.dim_order import DIM_ORDER, follows_order, order_entry, order_in
from optstate_codecs.state.groups import merged_groups
from optstate_codecs.state.layout import bound, empty_state, storage_order
from optstate_codecs.state.owner import StateOwner
from optstate_codecs.state.shards import as_owner, as_shards, shard_of, whole_of_shards
from optstate_codecs.state.structure import check_structure, check_values, malformed
from optstate_codecs.writes import CORRECTION, MASTER, SplitMaster, Write, parameter_write

__all__ = ["StepCopy", "adopt_copies", "full", "load", "packed"]

StateDict = dict[str, Any]
# a parameter, its state, and whether its step count is on its device
Loaded = tuple[Tensor, dict[str, Any], bool]


@dataclass(frozen=True)
class StepCopy:
    """The copy of a step count that a state dict holds, to find out whether it was written to.

    Step counts lie side by side in one storage, which some savers refuse and ``torch.save`` writes
    whole, so a state dict holds copies. Loaders that write in place change the copies.

    Attributes:
        param: the parameter that was stepped.
        state: of the parameter.
        step: the copy.
        version: of the copy when it was made.
        order: the entry for the order of dimensions, which is not a copy, or None.
        order_version: of that entry.
    """

    param: Tensor
    state: dict[str, Any]
    step: Tensor
    version: int
    order: Tensor | None
    order_version: int

    @classmethod
    def of(cls, param: Tensor, state: dict[str, Any], step: Tensor) -> StepCopy:
        """With the versions as they are now."""
        order = state.get(DIM_ORDER)
        return cls(param, state, step, step._version, order, 0 if order is None else order._version)


def adopt_copies(copies: Sequence[StepCopy], forget: Callable[[Tensor], None]) -> None:
    """Adopt step counts and orders of dimensions that were loaded in place into a state dict.

    Args:
        copies: in the state dict.
        forget: called with each parameter whose codes have got another order.
    """
    for copy in copies:
        if copy.step._version != copy.version and "step" in copy.state:
            copy.state["step"].copy_(copy.step)
        if copy.order is not None and copy.order._version != copy.order_version:
            forget(copy.param)


@torch.inference_mode(False)
def packed(optimizer: StateOwner, plain: StateDict) -> tuple[StateDict, list[StepCopy]]:
    """``plain``, as ``torch.optim`` makes it, with the formats of every group added.

    Returns:
        The state dict, and the copies of step counts in it.
    """
    params: dict[Any, Tensor] = {}
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        formats = optimizer.group_formats(group)
        saved["formats"] = {moment: format.spec for moment, format in formats.items()}
        params |= dict(zip(saved["params"], group["params"], strict=True))
    plain["param_groups"] = plain_value(plain["param_groups"])
    copies = []
    sharded = {param for param in params.values() if is_distributed(param)}
    steps = {id(s.state): s for s in optimizer.stored_param_steps(sharded)} if sharded else {}
    for number, state in plain["state"].items():
        if number in params and isinstance(state, dict) and "step" in state:
            step, param = state["step"].clone(), params[number]
            shards = as_shards(steps[id(state)], param) if param in sharded else {}
            plain["state"][number] = {**state, **shards, "step": step}
            copies.append(StepCopy.of(param, state, step))
    return plain, copies


def full(optimizer: StateOwner, plain: StateDict) -> StateDict:
    """``plain`` with decoded moments, and without the options that ``torch.optim`` lacks."""
    state = dict(plain["state"])
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        moments = optimizer.rule.moments(optimizer.rule.hyper(group))
        torch_names = {moment.name: moment.plain or moment.name for moment in moments}
        for number, param in zip(saved["params"], group["params"], strict=True):
            if state.get(number):
                (param_step,) = optimizer.stored_param_steps({param})
                decoded = as_owner(decode_param_step(param_step), param)
                write = parameter_write(optimizer.write, param.dtype)
                own_entries = own_keys(moments, {**param_step.bound, MASTER: write})
                foreign = {k: v for k, v in state[number].items() if k not in own_entries}
                named = {torch_names.get(key, key): part for key, part in decoded.items()}
                state[number] = {**named, **foreign}
    own = {*optimizer.storage_options, "formats", "orders", "rounding_seed", "rounding_key"}
    groups = [
        {key: plain_value(value) for key, value in group.items() if key not in own}
        for group in plain["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def load(optimizer: StateOwner, state_dict: StateDict) -> None:
    """Check and convert the whole of ``state_dict``, then put it in place."""
    with malformed("state_dict"):
        check_structure(state_dict, optimizer.param_groups)
        groups, state, loaded, rounded = _converted(optimizer, state_dict)

    if rounded:
        warnings.warn(
            f"state_dict keeps master weights of {rounded} parameters that this optimizer, "
            f"write={optimizer.write!r}, does not: training goes on from the parameters alone",
            stacklevel=3,
        )

    optimizer.executor.supersede()
    for target, group in zip(optimizer.param_groups, groups, strict=True):
        target.update(group)
    share_steps(loaded)
    optimizer.state.clear()
    optimizer.state.update(state)


def _converted(
    optimizer: StateOwner, state_dict: StateDict
) -> tuple[list[dict[str, Any]], dict[Any, Any], list[Loaded], int]:
    """The groups and the state after loading, and how many master weights are not kept."""
    groups, all_formats = _merged_groups(optimizer, state_dict["param_groups"])
    state: dict[Any, Any] = _other_entries(state_dict)
    loaded: list[Loaded] = []
    index, rounded, keys = 0, 0, rounding_keys(groups)
    saved_groups = state_dict["param_groups"]
    for group, saved_formats, saved in zip(groups, all_formats, saved_groups, strict=True):
        group_formats = optimizer.group_formats(group)
        moments = optimizer.rule.moments(optimizer.rule.hyper(group))
        for owner, number in zip(group["params"], saved["params"], strict=True):
            if stored := state_dict["state"].get(number):
                if not saved_formats:
                    stored = renamed(stored, moments)
                    if not optimizer.rule.counted:
                        stored = {"step": 1.0, **stored}
                where = f"state_dict['state'][{number!r}]"
                source = saved_formats or dict.fromkeys(group_formats, FP32())
                param, formats = local_of(owner), group_formats
                if is_distributed(owner):
                    formats = shard_formats(formats, owner)
                    stored, source = shard_of(where, owner, stored, moments, source)
                else:
                    stored, source = whole_of_shards(where, param, stored, source)
                _check_state(where, param, stored, source, formats)
                count = checked_count(f"{where}['step']", stored["step"])
                step = torch.tensor(count, dtype=torch.float32, device="cpu")
                counter = Counter(
                    group["rounding_seed"], taken(float(step)), keys[index], shard_offset(owner)
                )
                older = saved.get("orders", {}).get(number)
                order = _saved_order(where, param, stored, source, older)
                parts = _copied(param, stored, formats, order) if source == formats else None
                if parts is None:
                    decoded = decode_stored(param, stored, moments, source, order)
                    parts = encode_state(param, decoded, moments, formats, counter)
                write = parameter_write(optimizer.write, param.dtype)
                own = own_keys(moments, {**bound(source, param), MASTER: write}) | {CORRECTION}
                foreign = {k: _foreign(v, param) for k, v in stored.items() if k not in own}
                parts |= _correction(write, param, stored)
                if optimizer.state_device is not None:
                    # one parameter after the other: all of them may not fit on its device
                    parts = {key: part.to(optimizer.state_device) for key, part in parts.items()}
                state[owner] = {"step": step, **parts, **foreign}
                rounded += CORRECTION in stored and not write.components
                loaded.append((param, state[owner], counts_on_device(group)))
            index += 1
    return groups, state, loaded, rounded


def _other_entries(state_dict: StateDict) -> dict[Any, Any]:
    """Entries of ``state`` that belong to no parameter; ``torch.optim`` keeps them unchanged.

    Raises:
        KeyError: an entry looks like the state of a parameter that is in no group.
    """
    numbers = {n for saved in state_dict["param_groups"] for n in saved["params"]}
    kinds = {type(number) for number in numbers}
    found = {}
    for key, value in state_dict["state"].items():
        if key in numbers:
            continue
        counted = isinstance(value, Mapping) and "step" in value
        if type(key) is int or (type(key) in kinds and counted):
            raise KeyError(f"state_dict['state']: unknown parameter {key!r}")
        found[key] = deepcopy(value)
    return found


def _foreign(value: Any, param: Tensor) -> Any:
    """A copy of an entry not ours; tensors with dimensions go to the parameter's device."""
    if not isinstance(value, Tensor):
        return deepcopy(value)
    return value.detach().to(param.device if value.dim() else value.device, copy=True)


def _saved_order(
    where: str, param: Tensor, stored: Mapping[str, Any], source: Mapping[str, Format], older: Any
) -> tuple[int, ...]:
    """The order of dimensions that saved blocks follow; ``older`` is from a group's ``orders``."""
    if DIM_ORDER not in stored and older is not None:
        if sorted(older) != list(range(param.dim())):
            raise ValueError(f"{where}: order {older!r:.80}, must have each dimension once")
        return tuple(older)
    keys = [key for key, c in components_of(bound(source, param)).items() if c.suffix]
    return order_in(where, param, stored, keys) or tuple(range(param.dim()))


def _merged_groups(
    optimizer: StateOwner, saved_groups: list[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Format] | None]]:
    """The groups after loading, and the formats that each group's saved state is in (None: plain).

    Of the hyper-parameters, ``lr`` and ``betas`` must be saved. torch.optim gained the others over
    the years, and the optimizer's own values stand in for them.
    """
    formats = []

    def check(new: dict[str, Any], saved: Mapping[str, Any]) -> None:
        check_values(saved, new["params"])
        optimizer.check_group(new)
        formats.append(_saved_formats(optimizer, new, saved))

    groups = merged_groups(
        "state_dict['param_groups']",
        optimizer.param_groups,
        saved_groups,
        required=[key for key in ("lr", "betas") if key in optimizer.rule.defaults()],
        keep={*optimizer.storage_options, "formats", "orders", "decoupled_weight_decay"},
        convert=lambda k, v: deepcopy(plain_value(tuple(v) if k == "betas" else v)),
        check=check,
    )
    return groups, formats


def _saved_formats(
    optimizer: StateOwner, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Format] | None:
    """The formats of a saved group's state, or None where it is plain.

    Flattening drops the formats, but keeps the options that decide them.
    """
    if specs := saved.get("formats"):
        return {moment: parse_format(text) for moment, text in specs.items()}
    options = [key for key in optimizer.storage_options if key in group]
    if not options or not all(key in saved for key in options):
        return None
    return optimizer.group_formats({**group, **{key: saved[key] for key in options}})


def _check_state(
    where: str,
    param: Tensor,
    stored: Mapping[str, Any],
    source: Mapping[str, Format],
    formats: Mapping[str, Format],
) -> None:
    """Raise unless ``stored`` holds the components of ``source``, with their shapes and dtypes.

    A correction of the parameter is optional. Foreign keys are allowed, except those that look like
    a component of another format.
    """
    if different := sorted(set(source) ^ set(formats)):
        raise KeyError(f"{where}: moment {different[0]!r} is not in both checkpoint and optimizer")
    source = bound(source, param)
    keys = ["step", *components_of(source)]
    others = [key for key in stored if key not in (*keys, CORRECTION, DIM_ORDER)]
    names = tuple(name for moment in source for name in (moment, f"{moment}_"))
    if unknown := [k for k in others if k in names or str(k).startswith(names[1::2])]:
        raise KeyError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(keys)}")
    if missing := [key for key in keys if key not in stored]:
        raise KeyError(f"{where}: missing key {missing[0]!r}")
    for name, format in source.items():
        for component in format.components:
            key = component.key(name)
            part = stored[key]
            try:
                # torch.optim keeps moments in the parameter's dtype: any float is a plain moment
                check_component(f"{where}[{key!r}]", part, component, param, format == FP32())
                if part.is_meta and not param.is_meta:
                    raise ValueError(f"{where}[{key!r}]: is on meta, without values")
            except (TypeError, RuntimeError) as error:
                raise ValueError(str(error)) from error
            check_scales(f"{where}[{key!r}]", part, component, format)

    if CORRECTION in stored:
        part, name = stored[CORRECTION], f"{where}[{CORRECTION!r}]"
        if not torch.is_tensor(part) or part.dtype not in (torch.int8, torch.int16):
            raise ValueError(f"{name}: must be a tensor of dtype int8 or int16")
        try:
            check_tensor(name, part, param.shape, " as the parameter's")
        except (TypeError, RuntimeError) as error:
            raise ValueError(str(error)) from error


def _correction(write: Write, param: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The correction that ``write`` keeps; zeros, for the parameter itself, if none was saved."""
    if not isinstance(write, SplitMaster):
        return {}
    (component,) = write.components
    kept = empty_state(param, component)
    if CORRECTION in stored:
        kept.copy_(write.convert(stored[CORRECTION]))
    return {CORRECTION: kept}


def _copied(
    param: Tensor, stored: Mapping[str, Tensor], formats: Mapping[str, Format], order: Sequence[int]
) -> dict[str, Tensor] | None:
    """Copies of ``stored`` on the parameter's device; None if blocks must follow another order."""
    bounds = bound(formats, param)
    follows = follows_order(param, bounds.values())
    if follows and tuple(order) != storage_order(param):
        return None
    copies = {
        key: empty_state(param, component).copy_(stored[key])
        for key, component in components_of(bounds).items()
    }
    return {**copies, DIM_ORDER: order_entry(param)} if follows else copies
