"""Packed and full state dicts, and loading either, or one of ``torch.optim``'s.

A packed state dict is ``torch.optim``'s layout (``state`` by parameter number, ``param_groups``)
holding the stored components, with ``formats`` added to each group: {moment: text of its format},
and ``orders`` where codes share bytes and so cannot show in which order of dimensions they lie:
{parameter number: that order}, of parameters that are not contiguous.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optstate_codecs.formats import FP32, Format, parse_format
from optstate_codecs.layout import bound, empty_state, inverse_order, same_order, storage_order
from optstate_codecs.plain import plain_value
from optstate_codecs.rounding import Counter
from optstate_codecs.rules import Moment
from optstate_codecs.state import (
    counts_on_device,
    decode_moments,
    decode_state,
    encode_state,
    share_steps,
)
from optstate_codecs.writes import CORRECTION, SplitMaster, Write, parameter_write

if TYPE_CHECKING:
    from optstate_codecs.optimizer import CodedOptimizer

__all__ = ["full", "load", "packed"]

StateDict = dict[str, Any]


def packed(optimizer: CodedOptimizer, plain: StateDict) -> StateDict:
    """``plain``, as ``torch.optim`` gives it, with every group's formats named."""
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        formats = optimizer.group_formats(group)
        saved["formats"] = {moment: format.spec for moment, format in formats.items()}
        if any(format.components[0].span > 1 for format in formats.values()):
            places = zip(saved["params"], group["params"], strict=True)
            orders = {number: list(storage_order(param)) for number, param in places}
            saved["orders"] = {n: order for n, order in orders.items() if order != sorted(order)}
    plain["param_groups"] = plain_value(plain["param_groups"])
    # counts lie side by side in one storage, which some savers refuse and torch.save writes whole
    plain["state"] = {
        number: {**state, "step": state["step"].clone()} if "step" in state else state
        for number, state in plain["state"].items()
    }
    return plain


def full(optimizer: CodedOptimizer, plain: StateDict) -> StateDict:
    """``plain`` with decoded moments, without what ``torch.optim`` does not know."""
    state = {}
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        moments = optimizer.rule.moments(optimizer.rule.hyper(group))
        plainly = {moment.name: moment.plain or moment.name for moment in moments}
        for number, param in zip(saved["params"], group["params"], strict=True):
            if plain["state"].get(number):
                decoded = decode_state(optimizer, param)
                state[number] = {plainly.get(key, key): part for key, part in decoded.items()}
    own = {*optimizer.storage_options, "formats", "orders", "rounding_seed"}
    groups = [
        {key: plain_value(value) for key, value in group.items() if key not in own}
        for group in plain["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def load(optimizer: CodedOptimizer, state_dict: StateDict) -> None:
    """Check and convert the whole of ``state_dict``, then put it in place."""
    state_dict = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"state_dict: missing key {key!r}")

    groups = _merged_groups(optimizer, state_dict["param_groups"])
    numbers = [n for saved in state_dict["param_groups"] for n in saved["params"]]
    foreign = [n for n in state_dict["state"] if n not in numbers]
    if foreign:
        raise KeyError(f"state_dict['state']: unknown parameter {foreign[0]!r}")

    state: dict[Tensor, dict[str, Any]] = {}
    loaded = []
    index = rounded = 0
    for (group, saved_formats), saved in zip(groups, state_dict["param_groups"], strict=True):
        formats = optimizer.group_formats(group)
        moments = optimizer.rule.moments(optimizer.rule.hyper(group))
        for param, number in zip(group["params"], saved["params"], strict=True):
            if stored := state_dict["state"].get(number):
                if not saved_formats:
                    stored = _renamed(stored, moments)
                    if not optimizer.rule.counted:
                        stored = {"step": 1.0, **stored}
                where = f"state_dict['state'][{number!r}]"
                source = saved_formats or dict.fromkeys(formats, FP32())
                _check_state(where, param, stored, source, formats)
                step = _loaded_step(where, stored["step"])
                counter = Counter(group["rounding_seed"], int(step), index)
                order = saved.get("orders", {}).get(number, range(param.dim()))
                moved = _moved(param, stored, source, formats, order)
                if moved is None:
                    decoded = _decoded(param, stored, source, moments, order)
                    moved = encode_state(param, decoded, moments, formats, counter)
                write = parameter_write(optimizer.write, param.dtype)
                moved |= _correction(write, param, stored)
                if optimizer.home is not None:
                    # one parameter after the other: there may be no room for all beside them
                    moved = {key: part.to(optimizer.home) for key, part in moved.items()}
                state[param] = {"step": step, **moved}
                rounded += CORRECTION in stored and not write.components
                loaded.append((param, state[param], counts_on_device(group)))
            index += 1

    if rounded:
        warnings.warn(
            f"state_dict keeps master weights of {rounded} parameters that this optimizer, "
            f"write={optimizer.write!r}, does not: training goes on from the parameters alone",
            stacklevel=4,
        )

    optimizer._session.supersede()
    for target, (group, _) in zip(optimizer.param_groups, groups, strict=True):
        for key in set(target) - set(group):
            del target[key]
        target.update(group)
    share_steps(loaded)
    optimizer.state.clear()
    optimizer.state.update(state)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _merged_groups(
    optimizer: CodedOptimizer, saved_groups: list[Mapping[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Format] | None]]:
    """The groups as they will be, each with the formats its saved state is in (None: plain)."""
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"state_dict['param_groups']: {len(saved_groups)} groups, "
            f"must be {len(optimizer.param_groups)}"
        )
    merged = []
    for i, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        where = f"state_dict['param_groups'][{i}]"
        known = ("params", *optimizer.rule.defaults())
        # torch.optim gained its other keys over the years; a default stands in for those
        if missing := [k for k in ("params", "lr", "betas") if k in known and k not in saved]:
            raise KeyError(f"{where}: missing key {missing[0]!r}")
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"{where}['params']: {len(saved['params'])} parameters, "
                f"must be {len(group['params'])}"
            )
        own = {*optimizer.storage_options, "formats", "orders", "params", "decoupled_weight_decay"}
        new = {k: deepcopy(plain_value(v)) for k, v in saved.items() if k not in own}
        if "betas" in new:
            new["betas"] = tuple(new["betas"])
        kept = {k: v for k, v in group.items() if k in own or k not in new}
        new = {**kept, **new}
        try:
            optimizer._check_group(new)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
        specs = saved.get("formats")
        merged.append((new, specs and {k: parse_format(text) for k, text in specs.items()}))
    return merged


def _renamed(stored: Mapping[str, Any], moments: Sequence[Moment]) -> dict[str, Any]:
    """A parameter's state with moments that ``torch.optim`` names otherwise under our names."""
    own = {moment.plain: moment.name for moment in moments if moment.plain}
    return {own.get(key, key): part for key, part in stored.items()}


def _check_state(
    where: str,
    param: Tensor,
    stored: Mapping[str, Any],
    source: Mapping[str, Format],
    formats: Mapping[str, Format],
) -> None:
    """Raise unless ``stored`` holds just the components of ``source``, in shape and dtype.

    A correction of the parameter may be there or not.
    """
    if different := sorted(set(source) ^ set(formats)):
        raise KeyError(f"{where}: moment {different[0]!r} is not in both checkpoint and optimizer")
    source = bound(source, param)
    keys = ["step", *(c.key(name) for name, f in source.items() for c in f.components)]
    if unknown := [key for key in stored if key not in (*keys, CORRECTION)]:
        raise KeyError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(keys)}")
    if missing := [key for key in keys if key not in stored]:
        raise KeyError(f"{where}: missing key {missing[0]!r}")
    for name, format in source.items():
        for component in format.components:
            key = component.key(name)
            part, shape = stored[key], component.shape(param.shape)
            if not torch.is_tensor(part) or tuple(part.shape) != shape:
                got = f"shape {tuple(part.shape)}" if torch.is_tensor(part) else repr(part)
                raise ValueError(f"{where}[{key!r}]: {got}, must be a tensor of shape {shape}")
            # torch.optim keeps moments in the parameter's dtype: any float is a plain moment
            plain = format == FP32() and part.is_floating_point()
            if part.dtype != component.dtype and not plain:
                raise ValueError(f"{where}[{key!r}]: dtype {part.dtype}, must be {component.dtype}")
            if component.suffix.startswith("scale") and not part.isfinite().all():
                raise ValueError(f"{where}[{key!r}]: must be finite")

    if CORRECTION in stored:
        part = stored[CORRECTION]
        if not torch.is_tensor(part) or part.dtype not in (torch.int8, torch.int16):
            raise ValueError(f"{where}[{CORRECTION!r}]: must be a tensor of dtype int8 or int16")
        if part.shape != param.shape:
            raise ValueError(
                f"{where}[{CORRECTION!r}]: shape {tuple(part.shape)}, "
                f"must be {tuple(param.shape)} as the parameter's"
            )


def _correction(write: Write, param: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``write`` keeps of ``param``: zeros, the parameter as it is, where none was saved."""
    if not isinstance(write, SplitMaster):
        return {}
    (component,) = write.components
    kept = empty_state(param, component)
    if CORRECTION in stored:
        kept.copy_(write.convert(stored[CORRECTION]))
    return {CORRECTION: kept}


def _loaded_step(where: str, step: Any) -> Tensor:
    step = plain_value(step)
    count = float(step) if isinstance(step, (int, float, Tensor)) else -1.0
    if not (count >= 0 and count == int(count)):
        raise ValueError(f"{where}['step']={step!r}: must be a whole number of at least 0")
    return torch.tensor(count, dtype=torch.float32)


def _moved(
    param: Tensor,
    stored: Mapping[str, Tensor],
    source: Mapping[str, Format],
    formats: Mapping[str, Format],
    order: Sequence[int],
) -> dict[str, Tensor] | None:
    """Copies of ``stored`` beside ``param``, or None where they are not stored as wanted."""
    if source != formats:
        return None
    parts = {c.key(name): c for name, f in bound(formats, param).items() for c in f.components}
    if not all(same_order(stored[key], c, param) for key, c in parts.items()):
        return None
    packed = any(format.components[0].span > 1 for format in formats.values())
    if packed and tuple(order) != storage_order(param):
        return None
    return {
        key: stored[key].detach().to(param.device, c.dtype, copy=True) for key, c in parts.items()
    }


def _decoded(
    param: Tensor,
    stored: Mapping[str, Tensor],
    source: Mapping[str, Format],
    moments: Sequence[Moment],
    order: Sequence[int],
) -> dict[str, Tensor]:
    """The moments of a checkpoint, whatever order in memory it was saved in.

    Blocks follow the order that the codes had when they were saved, so that order decides; it is
    ``order`` where codes share bytes.
    """
    parts = [(c.key(n), c) for n, f in bound(source, param).items() for c in f.components]
    ordered = torch.empty([param.shape[d] for d in order]).permute(inverse_order(order))
    like = next((stored[key] for key, c in parts if c.per_element and c.suffix), ordered)
    local = {
        key: torch.empty_like(like, dtype=c.dtype, device=param.device).copy_(stored[key])
        if c.per_element
        else stored[key].to(param.device)
        for key, c in parts
    }
    return decode_moments(like, local, moments, source)
