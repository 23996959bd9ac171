"""Converts the state of a parameter to the form that a step takes.

Anybody may edit ``optimizer.state``: state is built by hand in ``torch.optim``'s layout, a moment
is assigned in plain numbers, a parameter gets another shape or layout in memory, foreign entries
are added. Valid edits are encoded; others raise an error that names them. Nothing is changed here:
the new entries are returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.counts import taken
from optstate_codecs.engine.request import ParamStep
from optstate_codecs.formats import Component, Format
from optstate_codecs.rounding import Counter
from optstate_codecs.rules import Moment
from optstate_codecs.sharding import local_of
from optstate_codecs.state.building import decode_stored, encode_state, initial_state
from optstate_codecs.state.components import check_component, check_tensor, components_of
from optstate_codecs.state.dim_order import DIM_ORDER, follows_order, order_entry, order_in
from optstate_codecs.state.layout import Declaration, bound, empty_state, same_order, storage_order
from optstate_codecs.writes import MASTER, Write

__all__ = ["StateForm", "conformed", "has_state", "own_keys", "renamed"]

RESHAPED = (
    "; a parameter that has changed its shape needs its state removed: optimizer.state.pop(p)"
)


@dataclass(frozen=True)
class StateForm:
    """The form that a parameter's state must have.

    Attributes:
        param: gives shape, layout and device.
        moments: of the rule, in its order.
        formats: of the moments, as in the group.
        seed: keys random numbers, together with ``key`` and step count.
        write: of the parameter.
        index: of the parameter, counted over all groups.
        offset: of the first element, from which random numbers are counted.
        state_device: where state is present; None: on the parameter's device.
        counted: whether ``torch.optim``'s class of the rule counts its steps.
        stepped: whether a step takes the state; otherwise it may be on any device.
        key: keys random numbers, see ``ParamStep``; -1: the index.
    """

    param: Tensor
    moments: tuple[Moment, ...]
    formats: Mapping[str, Format]
    seed: int
    write: Write
    index: int
    offset: int = 0
    state_device: torch.device | None = None
    counted: bool = True
    stepped: bool = True
    key: int = -1

    @property
    def where(self) -> str:
        """The parameter's name in messages."""
        return f"parameter {self.index}"

    def param_step(self, state: dict[str, Any], group: int) -> ParamStep:
        """The ``ParamStep`` for state of this form."""
        own = (self.param, state, self.moments, self.formats, self.write, self.seed)
        return ParamStep(*own, self.index, group, self.offset, key=self.key)

    @property
    def stored(self) -> dict[str, Declaration]:
        """The declarations of the components: each moment's bound format, then the write."""
        return {**bound(self.formats, self.param), MASTER: self.write}


def own_keys(moments: Sequence[Moment], stored: Mapping[str, Declaration]) -> set[str]:
    """All keys that the optimizer itself may use in a parameter's state, in any form."""
    names = {m.name for m in moments} | {m.plain for m in moments if m.plain}
    return {"step", DIM_ORDER, *components_of(stored), *names}


def renamed(state: Mapping[str, Any], moments: Sequence[Moment]) -> dict[str, Any]:
    """A parameter's state with ``torch.optim``'s names of moments replaced by ours."""
    entries = dict(state)
    for moment in moments:
        if moment.plain in entries:
            entries[moment.name] = entries.pop(moment.plain)
    return entries


def has_state(state: Any, moments: Sequence[Moment]) -> bool:
    """Whether a parameter's state has an entry of the optimizer itself, or is no mapping."""
    if not isinstance(state, Mapping):
        return state is not None
    names = tuple(name for m in moments for name in (m.name, m.plain) if name)
    return any(key == "step" or str(key).startswith(names) for key in state)


def conformed(form: StateForm, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a parameter's state, converted to ``form``; zeros for missing state.

    Args:
        form: the form.
        state: the present entries; not changed. Foreign entries are returned unchanged.

    Raises:
        TypeError, ValueError, RuntimeError, KeyError: an entry cannot be converted; the message
            names it.
    """
    param, stored = form.param, form.stored
    own = own_keys(form.moments, stored)
    foreign = {key: value for key, value in state.items() if key not in own}
    entries = renamed({k: _local(v) for k, v in state.items() if k in own}, form.moments)
    if not entries:
        return {**initial_state(param, stored, form.state_device), **foreign}
    with torch.inference_mode(False), torch.no_grad():
        step = _step(form, entries)
        new_parts = _encoded(form, entries, step)
        parts = components_of(stored)
        found = {key: entries[key] for key in parts if key in entries} | new_parts
        for name, declared in stored.items():
            keys = [component.key(name) for component in declared.components]
            missing = [key for key in keys if key not in found]
            if missing and len(missing) < len(keys):
                raise KeyError(f"{form.where}: state: missing key {missing[0]!r}")
        new = {
            key: _placed(form, key, component, found[key])
            if key in found
            else empty_state(param, component, form.state_device)
            for key, component in parts.items()
        }
        if follows_order(param, stored.values()):
            new[DIM_ORDER] = _order_entry(param, entries)
    return {"step": step, **new, **foreign}


def _local(value: Any) -> Any:
    return local_of(value) if isinstance(value, Tensor) else value


def _step(form: StateForm, entries: Mapping[str, Any]) -> Tensor:
    """The step count; the same tensor if it is a valid one."""
    step = entries.get("step", None if form.counted else 1.0)
    name = f"{form.where}: state['step']"
    if step is None:
        raise KeyError(f"{form.where}: state: missing key 'step'")
    if isinstance(step, Tensor):
        if step.numel() != 1:
            raise ValueError(f"{name}: shape {tuple(step.shape)}, must have one element")
        if step.dtype == torch.float32 and not step.dim() and not step.is_inference():
            return step
        return step.detach().to(torch.float32).reshape(()).clone()
    if isinstance(step, bool) or not isinstance(step, (int, float)):
        raise TypeError(f"{name}={step!r}: must be a number or a tensor, got {type(step).__name__}")
    return torch.tensor(float(step), dtype=torch.float32, device="cpu")


def _encoded(form: StateForm, entries: Mapping[str, Any], step: Tensor) -> dict[str, Tensor]:
    """Newly encoded components: of moments in plain numbers, or with blocks in another order."""
    param, formats = form.param, bound(form.formats, form.param)
    keys = {m.name: [c.key(m.name) for c in formats[m.name].components] for m in form.moments}
    plain = {
        m.name: entries[m.name]
        for m in form.moments
        if m.name in entries and m.name not in keys[m.name]
    }
    for name, value in plain.items():
        check_tensor(f"{form.where}: state[{name!r}]", value, param.shape, RESHAPED)
        if not value.is_floating_point():
            dtype = value.dtype
            raise TypeError(f"{form.where}: state[{name!r}]: dtype {dtype}, must be floating")
    present = [m for m in form.moments if set(keys[m.name]) <= entries.keys()]
    order = storage_order(param)
    if present and follows_order(param, formats.values()):
        codes = [key for moment in present for key in keys[moment.name]]
        order = order_in(f"{form.where}: state", param, entries, codes) or order
    reordered = order != storage_order(param)
    if not plain and not reordered:
        return {}
    components = components_of(formats)
    for key in [key for moment in present for key in keys[moment.name]]:
        shape = components[key].shape(param.shape)
        check_tensor(f"{form.where}: state[{key!r}]", entries[key], shape, RESHAPED)
    # a moment in units of another one can be decoded only while that one is stored
    readable = [m for m in present if _divisor(m, formats) in (None, *(k.name for k in present))]
    values = decode_stored(
        param, entries, readable, {m.name: form.formats[m.name] for m in readable}, order
    )
    zeros = {m.name: torch.zeros_like(param, dtype=torch.float32) for m in form.moments}
    values = {**zeros, **values, **plain}
    number = form.index if form.key < 0 else form.key
    counter = Counter(form.seed, taken(float(step)), number, form.offset)
    encoded = encode_state(param, values, form.moments, form.formats, counter)
    changed = {
        m.name
        for m in form.moments
        if reordered or m.name in plain or _divisor(m, formats) in plain
    }
    return {key: encoded[key] for name in changed for key in keys[name]}


def _divisor(moment: Moment, formats: Mapping[str, Format]) -> str | None:
    """The moment whose root is the unit of this stored moment, or None."""
    return moment.relative_to if formats[moment.name].in_update_units else None


def _order_entry(param: Tensor, entries: Mapping[str, Any]) -> Tensor:
    """The entry for the order of dimensions; the same tensor if it is right."""
    new, old = order_entry(param), entries.get(DIM_ORDER)
    if not isinstance(old, Tensor) or old.is_inference():
        return new
    return old if (old.dtype, old.shape, int(old)) == (new.dtype, new.shape, int(new)) else new


def _placed(form: StateForm, key: str, component: Component, given: Any) -> Tensor:
    """A component with its dtype, device and layout in memory; the same tensor if it has them."""
    param = form.param
    name = f"{form.where}: state[{key!r}]"
    any_float = component.dtype.is_floating_point and component.per_element
    value = check_component(name, given, component, param, any_float, RESHAPED)
    state_device = form.state_device or param.device
    if value.device not in (state_device, param.device):
        if form.stepped:
            raise RuntimeError(
                f"{name}: on {value.device}, must be on {state_device} as the parameter"
            )
        state_device = value.device
    right = (
        value.dtype == component.dtype and value.device == state_device and not value.is_inference()
    )
    if right and same_order(value, component, param):
        return value
    return empty_state(param, component, state_device).copy_(value)
