"""The table of parameters: which has which state, formats and gradient, found again at each step.

Everything here may change between two steps without a word: parameters get other memory, another
shape or dtype, state is replaced or edited, groups change. What was found is kept, and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs.engine.capture import capturing, needs_warm_up
from optstate_codecs.engine.request import ParamStep
from optstate_codecs.formats import Format
from optstate_codecs.param_checks import check_kind, check_steppable
from optstate_codecs.rules import Moment
from optstate_codecs.sharding import (
    any_distributed,
    check_placements,
    is_distributed,
    local_of,
    shard_formats,
    shard_offset,
)
from optstate_codecs.state.building import counts_on_device, share_steps
from optstate_codecs.state.conform import Wanted, conformed, own_keys
from optstate_codecs.writes import parameter_write

__all__ = ["Entry", "Gradients", "GroupSpec", "ParameterTable", "StateSpec"]

Groups = Sequence[Mapping[str, Any]]
# sets of parameters of which is kept what was found: the buckets of a GradientRelease are as many
REMEMBERED = 256


class Entry(NamedTuple):
    """A parameter, and its gradient where a step is to take one.

    Attributes:
        number: its place in the optimizer, counted over all groups.
        group: the number of its group.
        param: the parameter.
        grad: the gradient, or None.
    """

    number: int
    group: int
    param: Tensor
    grad: Tensor | None = None


@dataclass(eq=False)
class Gradients:
    """The parameters that a step takes and their gradients, by column.

    Attributes:
        numbers: the place of each parameter in the optimizer, counted over all groups.
        groups: the number of the group of each.
        params: the parameters, as the groups have them.
        grads: their gradients; of a DTensor the local shards.
        addresses: of the gradients' first elements.
        layouts: the dtype and strides of each gradient.
    """

    numbers: list[int]
    groups: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    addresses: list[int] = field(default_factory=list)
    layouts: list[Any] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        """Row by row."""
        columns = (self.numbers, self.groups, self.params, self.grads)
        return [Entry(*row) for row in zip(*columns, strict=True)]


class _Found:
    """What was found for the parameters of a step, by column, to be compared at the next one.

    A step of many small tensors is bound by the host, and a list comprehension over one column
    takes a fraction of what a loop over rows with calls in it does.
    """

    def __init__(
        self, given: Gradients, specs: Sequence[GroupSpec], param_steps: list[ParamStep]
    ) -> None:
        self.addresses, self.layouts = given.addresses, given.layouts
        self.param_steps = param_steps
        self._params, self._specs = given.params, list(specs)
        self._states = [param_step.state for param_step in param_steps]
        self._used = [
            (param_step.state, itemgetter(*param_step.keys, "step")) for param_step in param_steps
        ]
        self._sharded = any_distributed(given.params)
        self._where = self._look()

    def holds(
        self, given: Gradients, specs: Sequence[GroupSpec], states: Mapping[Tensor, Any]
    ) -> bool:
        """Whether all of it is where it was, and laid out as it was."""
        if not (
            len(specs) == len(self._specs)
            and all(map(is_, specs, self._specs))
            and all(map(is_, given.params, self._params))
            and all(map(is_, map(states.get, given.params), self._states))
        ):
            return False
        try:
            return self._where == self._look()
        except (KeyError, AttributeError):
            return False

    def _look(self) -> tuple[list[Any], ...]:
        params = list(map(local_of, self._params)) if self._sharded else self._params
        return (
            [len(state) for state, _ in self._used],
            [param.data_ptr() for param in params],
            [param.shape for param in params],
            [param.stride() for param in params],
            [value.data_ptr() for state, get in self._used for value in get(state)[:-1]],
        )


class GroupSpec(NamedTuple):
    """What of a group decides how its parameters are stored and rounded."""

    moments: tuple[Moment, ...]
    formats: Mapping[str, Format]
    seed: int


@dataclass(frozen=True)
class StateSpec:
    """What decides how the state of all parameters is kept.

    Attributes:
        write: the name of the parameter write.
        home: where state is kept; None is beside each parameter.
        counted: whether ``torch.optim``'s class of the rule counts its steps.
    """

    write: str
    state_device: torch.device | None
    counted: bool


class ParameterTable:
    """What was found at the last step, for every parameter."""

    def __init__(self) -> None:
        self._param_steps: dict[int, ParamStep] = {}
        # those whose state was only looked at, on a device where it cannot be stepped
        self._away: set[int] = set()
        self._specs: dict[int, GroupSpec] = {}
        # by the numbers of the parameters that had gradients
        self._found: dict[tuple[int, ...], _Found] = {}
        self._numbers: dict[Tensor, tuple[int, int, int]] = {}
        # of DTensors, by number: the group's formats, and those for the global size
        self._sharded_formats: dict[int, tuple[Any, dict[str, Format]]] = {}

    def forget(self, param: Tensor) -> None:
        """Look at the state of a parameter anew, the next time that it is wanted."""
        local = local_of(param)
        for index in [
            i for i, param_step in self._param_steps.items() if param_step.param is local
        ]:
            del self._param_steps[index]
        self._found.clear()

    def number(self, groups: Groups, param: Tensor) -> int:
        """The place of a parameter, counted over all groups; looked up where it was last time."""
        number, place, index = self._numbers.get(param, (0, 0, 0))
        here = groups[number]["params"] if number < len(groups) else []
        if place < len(here) and here[place] is param:
            return index
        every = [(n, k, p) for n, group in enumerate(groups) for k, p in enumerate(group["params"])]
        self._numbers = {p: (n, k, index) for index, (n, k, p) in enumerate(every)}
        return self._numbers[param][2]

    def spec(self, number: int, new: GroupSpec) -> GroupSpec:
        """A group's specification: the same object until it changes."""
        if self._specs.get(number) != new:
            self._specs[number] = new
        return self._specs[number]

    def gradients(self, groups: Groups, given: Mapping[int, Tensor] | None) -> Gradients:
        """The parameters that have gradients: those ``given`` by place, or else their own.

        Raises:
            TypeError, ValueError: a gradient is unusable, by name.
        """
        every = [(n, p) for n, group in enumerate(groups) for p in group["params"]]
        if given is None:
            grads = [param.grad for _, param in every]
            numbers = [number for number, grad in enumerate(grads) if grad is not None]
            chosen = [grad for grad in grads if grad is not None]
        else:
            numbers = sorted(given)
            chosen = [given[number] for number in numbers]
        found = Gradients(
            numbers,
            [every[number][0] for number in numbers],
            [every[number][1] for number in numbers],
            chosen,
        )
        sharded = any_distributed(chosen)
        if sharded:
            found.grads = chosen = [
                _local_grad(index, every[index][1], grad)
                for index, grad in zip(numbers, chosen, strict=True)
            ]
        if any(grad.layout is not torch.strided for grad in chosen):
            self._check(found, sharded)
        addresses = [grad.data_ptr() for grad in chosen]
        layouts = [(grad.dtype, grad.stride()) for grad in chosen]
        last = self._found.get(tuple(numbers))
        # good gradients that lay and looked alike make these good too; where a parameter has
        # changed, its unit is made anew, which checks again
        if last is None or last.addresses != addresses or last.layouts != layouts:
            self._check(found, sharded)
        if last is not None and last.layouts == layouts:
            layouts = last.layouts
        if last is not None:
            last.addresses, last.layouts = addresses, layouts
        found.addresses, found.layouts = addresses, layouts
        return found

    @staticmethod
    def _check(found: Gradients, sharded: bool) -> None:
        for entry in found.entries:
            assert entry.grad is not None
            if not sharded:
                _local_grad(entry.number, entry.param, entry.grad)
            check_grad(entry.number, local_of(entry.param), entry.grad)

    def cached_param_steps(
        self,
        groups: Groups,
        given: Gradients,
        specs: Sequence[GroupSpec],
        states: dict[Tensor, Any],
        kept: StateSpec,
    ) -> list[ParamStep]:
        """``param_steps`` for the parameters of a step: the same list where nothing has changed."""
        key = tuple(given.numbers)
        last = self._found.get(key)
        if last is not None and last.holds(given, specs, states):
            return last.param_steps
        param_steps = self.param_steps(groups, given.entries, specs, states, kept)
        if len(self._found) >= REMEMBERED:
            # models that route have ever new sets of parameters with gradients
            self._found.clear()
        self._found[key] = _Found(given, specs, param_steps)
        return param_steps

    def param_steps(
        self,
        groups: Groups,
        entries: Sequence[Entry],
        specs: Sequence[GroupSpec],
        states: dict[Tensor, Any],
        kept: StateSpec,
    ) -> list[ParamStep]:
        """A unit for each entry, last time's where nothing has changed.

        State that is missing is started, and state that was changed is brought into the form that
        a step takes, see ``conform``.

        Raises:
            TypeError, ValueError, RuntimeError, KeyError: what cannot be stepped, by name; no state
                has changed.
        """
        param_steps, anew = self._param_steps, []
        for entry in entries:
            index, group, param = entry[:3]
            spec = specs[group]
            formats = self._formats_of(index, spec, param)
            param = local_of(param)
            param_step = param_steps.get(index)
            if (
                param_step is None
                or param_step.param is not param
                or param_step.state is not states.get(entry.param)
                or param_step.formats is not formats
                or param_step.seed != spec.seed
                or param_step.group != group
                or param_step.write.dtype is not param.dtype
                or param_step.moved()
                or (index in self._away and entry.grad is not None)
            ):
                anew.append(entry)
        if anew:
            self._renew(groups, anew, specs, states, kept)
        return [param_steps[entry.number] for entry in entries]

    def _formats_of(self, index: int, spec: GroupSpec, param: Tensor) -> Mapping[str, Format]:
        """The formats of a parameter: those of its group, for a DTensor as its global size asks."""
        if type(param) is Parameter or not is_distributed(param):
            return spec.formats
        given, formats = self._sharded_formats.get(index, (None, {}))
        if given is not spec.formats:
            formats = shard_formats(spec.formats, param)
            self._sharded_formats[index] = spec.formats, formats
        return formats

    def _renew(
        self,
        groups: Groups,
        entries: Sequence[Entry],
        specs: Sequence[GroupSpec],
        states: dict[Tensor, Any],
        kept: StateSpec,
    ) -> None:
        """Make units anew; all state is looked at before any is changed."""
        changes = []
        for entry in entries:
            index, number, param, grad = entry[:4]
            moments, _, seed = specs[number]
            formats = self._formats_of(index, specs[number], param)
            offset = shard_offset(param) if is_distributed(param) else 0
            param = local_of(param)
            if grad is not None:
                check_grad(index, param, grad)
            write = parameter_write(kept.write, param.dtype)
            wanted = Wanted(
                f"parameter {index}",
                param,
                moments,
                formats,
                write,
                seed,
                index,
                kept.state_device,
                kept.counted,
                stepped=grad is not None,
                offset=offset,
            )
            state = states.get(entry.param, {})
            if not isinstance(state, dict):
                raise TypeError(f"parameter {index}: state: must be a dict, got {type(state)}")
            is_fresh = not own_keys(moments, wanted.stored) & state.keys()
            if capturing() and is_fresh:
                raise needs_warm_up(f"parameter {index} has no state")
            with torch.inference_mode(False):
                changes.append((entry, wanted, conformed(wanted, state), is_fresh))
        fresh = []
        for entry, _, new, is_fresh in changes:
            _, number, param = entry[:3]
            state = states.get(param)
            if state is None:
                state = states[param] = new
            elif list(state) != list(new) or any(new[key] is not state[key] for key in new):
                state.clear()
                state.update(new)
            if is_fresh:
                fresh.append((param, state, counts_on_device(groups[number])))
        share_steps(fresh)
        for entry, wanted, *_ in changes:
            index, number, owner = entry[:3]
            param = wanted.param
            param_step = self._param_steps[index] = ParamStep(
                param,
                states[owner],
                wanted.moments,
                wanted.formats,
                wanted.write,
                wanted.seed,
                index,
                number,
                wanted.offset,
            )
            homes = (wanted.state_device or param.device, param.device)
            here = all(param_step.state[key].device in homes for key in param_step.keys[1:])
            (self._away.discard if here else self._away.add)(index)


def _local_grad(index: int, param: Tensor, grad: Tensor) -> Tensor:
    """The shard of a gradient that belongs to the parameter's shard.

    Raises:
        TypeError, ValueError: one of the two is a DTensor and the other is not, or the global
            shapes differ.
    """
    name = f"gradient of parameter {index}"
    if is_distributed(grad) != is_distributed(param):
        kinds = type(grad).__name__, type(param).__name__
        raise TypeError(f"{name}: is a {kinds[0]}, must be a {kinds[1]} as the parameter")
    if not is_distributed(grad):
        return grad
    ours: Any = param
    theirs: Any = grad
    if theirs.shape != ours.shape:
        raise ValueError(
            f"{name}: shape {tuple(theirs.shape)}, must be {tuple(ours.shape)} as the parameter's"
        )
    check_placements(f"parameter {index}", ours)
    if theirs.placements != ours.placements:
        # a sum that is still to be made, as tensor parallelism leaves it
        theirs = theirs.redistribute(ours.device_mesh, ours.placements)
    return local_of(theirs)


def check_grad(index: int, param: Tensor, grad: Tensor) -> None:
    """Raise unless a gradient can be used.

    Raises:
        TypeError, ValueError, RuntimeError: what is wrong with it or its parameter, by name.
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
