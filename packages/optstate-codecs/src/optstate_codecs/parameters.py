"""The table of parameters: which state, formats and gradient each of them has at a step.

All of these may change between two steps without notice: a parameter gets other memory, another
shape or dtype, its state is replaced or edited, its group changes. So the table caches the result
of a step and compares it at the next one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optstate_codecs.engine.capture import capturing, needs_warm_up
from optstate_codecs.engine.request import ParamStep
from optstate_codecs.formats import Format
from optstate_codecs.param_checks import check_kind, check_steppable
from optstate_codecs.plain import plain_value
from optstate_codecs.rounding_keys import KeySource
from optstate_codecs.rules import Moment
from optstate_codecs.sharding import (
    any_distributed,
    is_distributed,
    local_grad,
    local_of,
    shard_formats,
    shard_offset,
)
from optstate_codecs.state.building import counts_on_device, share_steps
from optstate_codecs.state.conform import StateForm, conformed, has_state, own_keys
from optstate_codecs.state.owner import StateOwner
from optstate_codecs.step_columns import CachedSteps, Gradients, GroupColumns, Row, StepCache
from optstate_codecs.writes import parameter_write

__all__ = ["GroupSpec", "ParameterTable", "StateSpec", "check_grad"]

Groups = Sequence[Mapping[str, Any]]


class GroupSpec(NamedTuple):
    """The parts of a group that decide how its parameters are stored and rounded."""

    moments: tuple[Moment, ...]
    formats: Mapping[str, Format]
    seed: int


@dataclass(frozen=True)
class StateSpec:
    """The existing state of all parameters, and the options that decide its form.

    Attributes:
        groups: the param groups.
        specs: one per group; the same object until the group changes.
        states: each parameter's state.
        write: the name of the parameter write.
        state_device: where state is kept; None: on the parameter's device.
        counted: whether ``torch.optim``'s class of the rule counts its steps.
    """

    groups: Groups
    specs: Sequence[GroupSpec]
    states: dict[Tensor, Any]
    write: str
    state_device: torch.device | None
    counted: bool


class ParameterTable:
    """Which state, formats and gradient each parameter has, cached from step to step."""

    def __init__(self) -> None:
        self._param_steps: dict[int, ParamStep] = {}
        # indices of parameters with state on another device, which may be read but not stepped
        self._not_steppable: set[int] = set()
        self._specs: dict[int, GroupSpec] = {}
        self._columns: GroupColumns | None = None
        self._cached = StepCache()
        # each parameter's group, position in the group, and index
        self._positions: dict[Tensor, tuple[int, int, int]] = {}
        # of DTensors, by index: the group's formats, and those of the parameter
        self._shard_formats: dict[int, tuple[Any, dict[str, Format]]] = {}
        self._key_source = KeySource()

    def forget(self, param: Tensor) -> None:
        """Check the state of a parameter again the next time that it is used."""
        steps, local = self._param_steps.items(), local_of(param)
        self._param_steps = {index: step for index, step in steps if step.param is not local}
        self._cached.clear()

    def index_of(self, groups: Groups, param: Tensor) -> int:
        """The index of a parameter, counted over all groups; its last position is tried first.

        Raises:
            KeyError: no group holds it.
        """
        number, position, index = self._positions.get(param, (0, 0, 0))
        members = groups[number]["params"] if number < len(groups) else []
        if position < len(members) and members[position] is param:
            return index
        every = [(n, k, p) for n, group in enumerate(groups) for k, p in enumerate(group["params"])]
        self._positions = {p: (n, k, index) for index, (n, k, p) in enumerate(every)}
        return self._positions[param][2]

    def state_spec(
        self, owner: StateOwner, hypers: Sequence[Any], states: dict[Tensor, Any]
    ) -> StateSpec:
        """The existing state, and the form that it must have.

        Args:
            owner: the optimizer.
            hypers: the validated hyper-parameters of each group.
            states: each parameter's state, also where some is still being stored.
        """
        if self._key_source.changed(owner.param_groups):
            self._param_steps.clear()
            self._cached.clear()
        specs = []
        for number, (group, hyper) in enumerate(zip(owner.param_groups, hypers, strict=True)):
            moments, formats = owner.rule.moments(hyper), owner.group_formats(group)
            new = GroupSpec(moments, formats, plain_value(group["rounding_seed"]))
            if self._specs.get(number) != new:
                self._specs[number] = new
            specs.append(self._specs[number])
        counted = owner.rule.counted
        return StateSpec(
            owner.param_groups, specs, states, owner.write, owner.state_device, counted
        )

    def gradients(self, groups: Groups, given: Mapping[int, Tensor] | None) -> Gradients:
        """The parameters that have gradients: those ``given`` by index, or else ``param.grad``.

        Raises:
            TypeError, ValueError: a gradient is unusable; the message names it.
        """
        found = self._present(groups) if given is None else _of_parts(groups, given)
        found.localize()
        try:
            found.read()
        except RuntimeError:
            if any(grad.layout is not torch.strided for grad in found.grads):
                self._check(found)
            raise
        last = self._cached.find(found)
        # gradients with the addresses and layouts of valid ones are valid; where a parameter has
        # changed, its ParamStep is made again, which checks its gradient
        if last is not None and last.same_layouts(found):
            found.layouts = last.layouts
            if last.addresses != found.addresses and not last.fit(found):
                self._check(found)
        else:
            self._check(found)
            found.layouts = list(zip(found.dtypes, found.strides, strict=True))
        if last is not None:
            last.note(found)
        return found

    def _present(self, groups: Groups) -> Gradients:
        """The parameters that have a gradient in ``param.grad``."""
        if self._columns is None or not self._columns.valid(groups):
            self._columns = GroupColumns(groups)
        return self._columns.gradients()

    @staticmethod
    def _check(found: Gradients) -> None:
        params, grads = found.params, found.grads
        if any_distributed(params):
            if not found.sharded:
                grads = list(map(local_grad, found.indices, params, grads))
            params = list(map(local_of, params))
        for index, param, grad in zip(found.indices, params, grads, strict=True):
            check_grad(index, param, grad)

    def stored(
        self, owner: StateOwner, states: dict[Tensor, Any], params: Collection[Tensor] | None
    ) -> list[ParamStep]:
        """``param_steps`` of the parameters that have state, in order; or of those in ``params``.

        Args:
            owner: the optimizer.
            states: each parameter's state, also where some is still being stored.
            params: None: all.
        """
        hypers = [owner.rule.hyper(group) for group in owner.param_groups]
        every = [(n, p) for n, group in enumerate(owner.param_groups) for p in group["params"]]
        rows = [
            (index, number, param, None)
            for index, (number, param) in enumerate(every)
            if (params is None or param in params)
            and has_state(states.get(param), owner.rule.moments(hypers[number]))
        ]
        return self.param_steps(rows, self.state_spec(owner, hypers, states))

    def cached_param_steps(self, given: Gradients, spec: StateSpec) -> list[ParamStep]:
        """``param_steps`` for the parameters of a step; the same list where nothing has changed."""
        last = self._cached.find(given)
        if last is not None and last.valid(given, spec.specs, spec.states):
            return last.param_steps
        param_steps = self.param_steps(given.rows, spec)
        self._cached.put(given, CachedSteps(given, spec.specs, param_steps))
        return param_steps

    def param_steps(self, rows: Sequence[Row], spec: StateSpec) -> list[ParamStep]:
        """A ``ParamStep`` for each row: the last one, or a new one where something has changed.

        Missing state is initialized, and state that was changed is converted to the form that a
        step takes, see ``state.conform``.

        Raises:
            TypeError, ValueError, RuntimeError, KeyError: a parameter cannot be stepped; the
                message names it, and no state has changed.
        """
        param_steps, outdated = self._param_steps, []
        for index, group, param, grad in rows:
            wanted, local = spec.specs[group], local_of(param)
            param_step = param_steps.get(index)
            if (
                param_step is None
                or param_step.param is not local
                or param_step.state is not spec.states.get(param)
                or param_step.formats is not self._formats_of(index, wanted, param)
                or param_step.seed != wanted.seed
                or param_step.group != group
                or param_step.write.dtype is not param.dtype
                or param_step.moved()
                or (index in self._not_steppable and grad is not None)
            ):
                outdated.append((index, group, param, grad))
        if outdated:
            self._renew(outdated, spec)
        return [param_steps[index] for index, *_ in rows]

    def _formats_of(self, index: int, spec: GroupSpec, param: Tensor) -> Mapping[str, Format]:
        """The formats of a parameter: its group's, or those that suit the shards of a DTensor."""
        if not is_distributed(param):
            return spec.formats
        given, formats = self._shard_formats.get(index, (None, {}))
        if given is not spec.formats:
            formats = shard_formats(spec.formats, param)
            self._shard_formats[index] = spec.formats, formats
        return formats

    def _renew(self, rows: Sequence[Row], spec: StateSpec) -> None:
        """Make each ``ParamStep`` again; all state is checked before any is changed."""
        states, device, counted = spec.states, spec.state_device, spec.counted
        changes, fresh, keys = [], [], self._key_source.keys(spec.groups)
        for index, number, param, grad in rows:
            local, offset = local_of(param), shard_offset(param)
            if grad is not None:
                check_grad(index, local, grad)
            write, stepped = parameter_write(spec.write, param.dtype), grad is not None
            group = spec.specs[number]
            kept = group._replace(formats=self._formats_of(index, group, param))
            key, place = keys[index], (index, offset)
            form = StateForm(local, *kept, write, *place, device, counted, stepped, key)
            state = states.get(param, {})
            if not isinstance(state, dict):
                raise TypeError(f"parameter {index}: state: must be a dict, got {type(state)}")
            is_fresh = not own_keys(form.moments, form.stored) & state.keys()
            if capturing() and is_fresh:
                raise needs_warm_up(f"parameter {index} has no state")
            with torch.inference_mode(False):
                changes.append((param, number, form, conformed(form, state), is_fresh))
        for param, number, form, new, is_fresh in changes:
            state = states.get(param)
            if state is None:
                state = states[param] = new
            elif list(state) != list(new) or any(new[key] is not state[key] for key in new):
                state.clear()
                state.update(new)
            if is_fresh:
                fresh.append((form.param, state, counts_on_device(spec.groups[number])))
        share_steps(fresh)
        for param, number, form, *_ in changes:
            param_step = self._param_steps[form.index] = form.param_step(states[param], number)
            allowed = (device or form.param.device, form.param.device)
            steppable = all(param_step.state[k].device in allowed for k in param_step.keys[1:])
            (self._not_steppable.discard if steppable else self._not_steppable.add)(form.index)


def _of_parts(groups: Groups, given: Mapping[int, Tensor]) -> Gradients:
    """The parameters with the gradients ``given`` by index, without listing all parameters."""
    indices = sorted(given)
    starts = list(accumulate((len(group["params"]) for group in groups), initial=0))
    numbers = [bisect_right(starts, index) - 1 for index in indices]
    places = zip(numbers, indices, strict=True)
    params = [groups[n]["params"][index - starts[n]] for n, index in places]
    return Gradients(indices, numbers, params, [given[index] for index in indices])


def check_grad(index: int, param: Tensor, grad: Tensor) -> None:
    """Raise unless a step can use a gradient.

    Raises:
        TypeError, ValueError, RuntimeError: the gradient or its parameter is unusable; the message
            names it.
    """
    name = f"gradient of parameter {index}"
    check_steppable(index, param)
    check_kind(name, grad)
    if grad.layout != torch.strided:
        raise TypeError(f"{name}: layout {grad.layout}, must be dense; use .to_dense()")
    if grad.is_complex():
        raise TypeError(f"{name}: dtype {grad.dtype}, must be real")
    if grad.device != param.device:
        raise ValueError(f"{name}: on {grad.device}, must be on {param.device}")
    if grad.shape != param.shape:
        raise ValueError(
            f"{name}: shape {tuple(grad.shape)}, must be {tuple(param.shape)} as the parameter's"
        )
