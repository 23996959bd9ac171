"""Packed and full state dicts, and loading either, or one of ``torch.optim``'s.

A packed state dict is ``torch.optim``'s layout (``state`` by parameter number, ``param_groups``)
holding the stored components, with ``formats`` added to each group: {moment: text of its format}.
It describes itself when parameters are renamed and when it is flattened, which keeps the keys that
a group has while it is used and no others: the options that decide its formats are among those, and
the order of dimensions that blocks follow is an entry of the state (``dim_order``). Checkpoints of
versions before that entry have ``orders`` in a group where codes share bytes: {parameter number:
that order}.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optstate_codecs.counts import taken
from optstate_codecs.engine.request import ParamStep
from optstate_codecs.formats import FP32, Format, parse_format
from optstate_codecs.parameters import ParameterTable
from optstate_codecs.plain import plain_value
from optstate_codecs.rounding import Counter
from optstate_codecs.rules import Moment
from optstate_codecs.sharding import (
    component_shape,
    is_distributed,
    local_of,
    local_slice,
    rewrapped,
    shard_formats,
    shard_offset,
)
from optstate_codecs.state.building import (
    counts_on_device,
    decode_param_step,
    decode_stored,
    encode_state,
    share_steps,
)
from optstate_codecs.state.conform import own_keys
from optstate_codecs.state.dim_order import (
    DIM_ORDER,
    assumed_order,
    follows_order,
    order_entry,
    order_of,
)
from optstate_codecs.state.layout import bound, empty_state, storage_order, stored_formats
from optstate_codecs.writes import CORRECTION, MASTER, SplitMaster, Write, parameter_write

if TYPE_CHECKING:
    from optstate_codecs.optimizer import CodedOptimizer

__all__ = ["Lent", "full", "load", "packed", "take_back"]

StateDict = dict[str, Any]


@dataclass(frozen=True)
class Lent:
    """A step count that a state dict has a copy of.

    Counts lie side by side in one storage, which some savers refuse and ``torch.save`` writes
    whole, so a state dict has copies of them. Loaders that write in place change the copies.

    Attributes:
        param: that it belongs to.
        state: of the parameter.
        step: the copy.
        version: of the copy as it was handed out.
        order: the entry for the order of dimensions, which is not a copy, or None.
        order_version: of that.
    """

    param: Tensor
    state: dict[str, Any]
    step: Tensor
    version: int
    order: Tensor | None
    order_version: int

    @classmethod
    def of(cls, param: Tensor, state: dict[str, Any], step: Tensor) -> Lent:
        """What was handed out, as it is now."""
        order = state.get(DIM_ORDER)
        return cls(param, state, step, step._version, order, 0 if order is None else order._version)


def take_back(table: ParameterTable, lent: Sequence[Lent]) -> None:
    """Take over what was loaded in place into a state dict since it was handed out."""
    for entry in lent:
        if entry.step._version != entry.version and "step" in entry.state:
            entry.state["step"].copy_(entry.step)
        if entry.order is not None and entry.order._version != entry.order_version:
            # codes are those of another layout in memory now
            table.forget(entry.param)


@torch.inference_mode(False)
def packed(optimizer: CodedOptimizer, plain: StateDict) -> tuple[StateDict, list[Lent]]:
    """``plain``, as ``torch.optim`` gives it, with every group's formats named.

    Returns:
        The state dict, and what of the state it has copies of.
    """
    params: dict[Any, Tensor] = {}
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        formats = optimizer.group_formats(group)
        saved["formats"] = {moment: format.spec for moment, format in formats.items()}
        params |= dict(zip(saved["params"], group["params"], strict=True))
    plain["param_groups"] = plain_value(plain["param_groups"])
    lent = []
    sharded = {p for p in params.values() if is_distributed(p)}
    steps = {id(s.state): s for s in optimizer.stored_param_steps(sharded)} if sharded else {}
    for number, state in plain["state"].items():
        if number in params and isinstance(state, dict) and "step" in state:
            step, param = state["step"].clone(), params[number]
            shown = as_shards(param, steps[id(state)]) if param in sharded else {}
            plain["state"][number] = {**state, **shown, "step": step}
            lent.append(Lent.of(param, state, step))
    return plain, lent


def as_shards(param: Tensor, param_step: ParamStep) -> dict[str, Tensor]:
    """The components of a DTensor's state as DTensors of the same placements; memory is shared."""
    return {
        (key := component.key(name)): rewrapped(
            param_step.state[key], param, component_shape(param, component)
        )
        for name, declared in param_step.stored.items()
        for component in declared.components
    }


def full(optimizer: CodedOptimizer, plain: StateDict) -> StateDict:
    """``plain`` with decoded moments, without what ``torch.optim`` does not know."""
    state = dict(plain["state"])
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        moments = optimizer.rule.moments(optimizer.rule.hyper(group))
        plainly = {moment.name: moment.plain or moment.name for moment in moments}
        for number, param in zip(saved["params"], group["params"], strict=True):
            if state.get(number):
                decoded = decode_param_step(*optimizer.stored_param_steps({param}))
                if is_distributed(param):
                    decoded = {
                        key: value if key == "step" else rewrapped(value, param, param.shape)
                        for key, value in decoded.items()
                    }
                write = parameter_write(optimizer.write, param.dtype)
                formats = bound(optimizer.group_formats(group), param)
                own = own_keys(moments, {**formats, MASTER: write})
                foreign = {key: value for key, value in state[number].items() if key not in own}
                named = {plainly.get(key, key): part for key, part in decoded.items()}
                state[number] = {**named, **foreign}
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
    state: dict[Any, Any] = _of_others(state_dict)
    loaded = []
    index = rounded = 0
    for (group, saved_formats), saved in zip(groups, state_dict["param_groups"], strict=True):
        group_formats = formats = optimizer.group_formats(group)
        moments = optimizer.rule.moments(optimizer.rule.hyper(group))
        for param, number in zip(group["params"], saved["params"], strict=True):
            if stored := state_dict["state"].get(number):
                if not saved_formats:
                    stored = _renamed(stored, moments)
                    if not optimizer.rule.counted:
                        stored = {"step": 1.0, **stored}
                where = f"state_dict['state'][{number!r}]"
                source = saved_formats or dict.fromkeys(formats, FP32())
                owner, offset, formats = param, 0, group_formats
                if is_distributed(owner):
                    param, offset = local_of(owner), shard_offset(owner)
                    stored, source = _shard_of(where, owner, stored, moments, source)
                    formats = shard_formats(formats, owner)
                else:
                    stored, source = _of_shards(param, stored, source)
                _check_state(where, param, stored, source, formats)
                step = _loaded_step(where, stored["step"])
                counter = Counter(group["rounding_seed"], taken(float(step)), index, offset)
                order = _saved_order(where, param, stored, source, saved.get("orders", {}), number)
                moved = _moved(param, stored, source, formats, order)
                if moved is None:
                    decoded = decode_stored(param, stored, moments, source, order)
                    moved = encode_state(param, decoded, moments, formats, counter)
                write = parameter_write(optimizer.write, param.dtype)
                own = own_keys(moments, {**bound(source, param), MASTER: write}) | {CORRECTION}
                others = {k: _copied(v, param) for k, v in stored.items() if k not in own}
                moved |= _correction(write, param, stored)
                if optimizer.state_device is not None:
                    # one parameter after the other: there may be no room for all beside them
                    moved = {key: part.to(optimizer.state_device) for key, part in moved.items()}
                state[owner] = {"step": step, **moved, **others}
                rounded += CORRECTION in stored and not write.components
                loaded.append((param, state[owner], counts_on_device(group)))
            index += 1

    if rounded:
        warnings.warn(
            f"state_dict keeps master weights of {rounded} parameters that this optimizer, "
            f"write={optimizer.write!r}, does not: training goes on from the parameters alone",
            stacklevel=3,
        )

    optimizer.executor.supersede()
    for target, (group, _) in zip(optimizer.param_groups, groups, strict=True):
        for key in set(target) - set(group):
            del target[key]
        target.update(group)
    share_steps(loaded)
    optimizer.state.clear()
    optimizer.state.update(state)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _shard_of(
    where: str,
    owner: Tensor,
    stored: Mapping[str, Any],
    moments: Sequence[Moment],
    source: Mapping[str, Format],
) -> tuple[dict[str, Any], dict[str, Format]]:
    """The part of a saved state that belongs to a DTensor's shard, and the formats it is in.

    Args:
        where: what messages call the state.
        owner: the parameter.
        stored: DTensors, or whole tensors on each worker.
        moments: the rule's.
        source: the formats of the saved group.

    Raises:
        ValueError: a shape is not that of a DTensor's state, nor of a plain tensor's.
    """
    local = local_of(owner)
    found, sized = dict(stored), shard_formats(source, owner)
    parts = {c.key(n): c for n, f in bound(sized, owner).items() for c in f.components}
    shapes = {key: (component_shape(owner, c), c.shape(owner.shape)) for key, c in parts.items()}
    # shared by both: one entry an element
    if CORRECTION in stored:
        found[CORRECTION] = local_slice(stored[CORRECTION], owner)
    if all(isinstance(v := stored.get(key), Tensor) and v.shape in shapes[key] for key in parts):
        for key, component in parts.items():
            value = stored[key]
            whole = value if is_distributed(value) else value.view(shapes[key][0])
            found[key] = local_slice(whole, owner).reshape(component.shape(local.shape))
        return found, sized
    # of a plain tensor, whose blocks do not stop at the ends of rows
    sized = stored_formats(source, owner.numel())
    parts = {c.key(n): c for n, f in bound(sized, owner).items() for c in f.components}
    for key, component in parts.items():
        given, expected = stored.get(key), component.shape(owner.shape)
        if isinstance(given, Tensor) and (given.shape != expected or is_distributed(given)):
            raise ValueError(f"{where}[{key!r}]: shape {tuple(given.shape)}, must be {expected}")
    like = torch.empty_strided(owner.shape, owner.stride(), dtype=owner.dtype, device=local.device)
    order = _saved_order(where, like, stored, sized, {}, None)
    decoded = decode_stored(like, stored, moments, sized, order)
    for key in parts:
        found.pop(key, None)
    found |= {name: local_slice(value, owner) for name, value in decoded.items()}
    found.pop(DIM_ORDER, None)
    return found, dict.fromkeys(sized, FP32())


def _of_shards(
    param: Tensor, stored: Mapping[str, Any], source: dict[str, Format]
) -> tuple[Mapping[str, Any], dict[str, Format]]:
    """State that was gathered from shards, and its formats; any other state as it is.

    Blocks of shards end with rows, see ``sharding.shard_formats``.
    """
    plain = bound(source, param)
    if _fits(stored, plain, param) or any(format.whole for format in plain.values()):
        return stored, source
    sized = shard_formats(source, param)
    parts = {c.key(n): c for n, f in bound(sized, param).items() for c in f.components}
    values = {key: v for key in parts if isinstance(v := stored.get(key), Tensor)}
    if len(values) < len(parts) or any(
        value.shape != component_shape(param, parts[key]) for key, value in values.items()
    ):
        return stored, source
    shaped = {key: value.reshape(parts[key].shape(param.shape)) for key, value in values.items()}
    return {**stored, **shaped}, sized


def _fits(stored: Mapping[str, Any], formats: Mapping[str, Format], param: Tensor) -> bool:
    """Whether all components of ``formats`` are there in the shapes that ``param`` asks for."""
    parts = {c.key(n): c for n, f in formats.items() for c in f.components}
    return all(
        isinstance(value := stored.get(key), Tensor)
        and tuple(value.shape) == component.shape(param.shape)
        for key, component in parts.items()
    )


def _of_others(state_dict: StateDict) -> dict[Any, Any]:
    """The entries of ``state`` that are no parameter's, which ``torch.optim`` keeps as they are.

    Raises:
        KeyError: one looks like the state of a parameter that is in no group.
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


def _copied(value: Any, param: Tensor) -> Any:
    """A copy of somebody else's entry; tensors with dimensions beside the parameter."""
    if not isinstance(value, Tensor):
        return deepcopy(value)
    return value.detach().to(param.device if value.dim() else value.device, copy=True)


def _saved_order(
    where: str,
    param: Tensor,
    stored: Mapping[str, Any],
    source: Mapping[str, Format],
    orders: Mapping[Any, Sequence[int]],
    number: Any,
) -> tuple[int, ...]:
    """The order of dimensions that blocks had when they were saved."""
    if DIM_ORDER in stored:
        return order_of(where, stored[DIM_ORDER], param.dim())
    if number in orders:
        return tuple(orders[number])
    parts = [c.key(n) for n, f in bound(source, param).items() for c in f.components if c.suffix]
    return assumed_order(param, [stored[key] for key in parts]) or tuple(range(param.dim()))


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
            optimizer.check_group(new)
            merged.append((new, _saved_formats(optimizer, new, saved)))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
    return merged


def _saved_formats(
    optimizer: CodedOptimizer, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Format] | None:
    """The formats of a saved group's state, or None where it is plain.

    They are not among the keys that flattening keeps, but what decides them is.
    """
    if specs := saved.get("formats"):
        return {moment: parse_format(text) for moment, text in specs.items()}
    options = optimizer.storage_options
    if not options or not all(key in saved for key in options):
        return None
    return optimizer.group_formats({**group, **{key: saved[key] for key in options}})


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
    others = [key for key in stored if key not in (*keys, CORRECTION, DIM_ORDER)]
    # what others keep there is kept; a component of another format would be taken for that
    names = tuple(name for moment in source for name in (moment, f"{moment}_"))
    if unknown := [k for k in others if k in names or str(k).startswith(names[1::2])]:
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
    if not (0 <= count < float("inf") and count == int(count)):
        raise ValueError(f"{where}['step']={step!r}: must be a whole number of at least 0")
    return torch.tensor(count, dtype=torch.float32, device="cpu")


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
    bounds = bound(formats, param)
    follows = follows_order(param, bounds.values())
    if follows and tuple(order) != storage_order(param):
        return None
    parts = {c.key(name): c for name, f in bounds.items() for c in f.components}
    moved = {key: empty_state(param, c).copy_(stored[key]) for key, c in parts.items()}
    return {**moved, DIM_ORDER: order_entry(param)} if follows else moved
