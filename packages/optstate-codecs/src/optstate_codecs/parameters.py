"""The table of parameters: which has which state, formats and gradient, found again at each step.

Everything here may change between two steps without a word: parameters get other memory, another
shape or dtype, state is replaced or edited, groups change. What was found is kept, and compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optstate_codecs.conform import Wanted, conformed, own_keys
from optstate_codecs.engine.capture import capturing, needs_warm_up
from optstate_codecs.engine.unit import Unit, layout_of
from optstate_codecs.formats import Format
from optstate_codecs.param_checks import check_kind, check_steppable
from optstate_codecs.rules import Moment
from optstate_codecs.state import counts_on_device, share_steps
from optstate_codecs.writes import parameter_write

__all__ = ["Entry", "GroupSpec", "ParameterTable", "StateSpec"]

Groups = Sequence[Mapping[str, Any]]


class Entry(NamedTuple):
    """A parameter, and its gradient where a step is to take one.

    Attributes:
        number: its place in the optimizer, counted over all groups.
        group: the number of its group.
        param: the parameter.
        grad: the gradient, or None.
        address: of the gradient's first element.
        layout: ``layout_of`` the gradient.
    """

    number: int
    group: int
    param: Tensor
    grad: Tensor | None = None
    address: int = 0
    layout: Any = None


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
    home: torch.device | None
    counted: bool


class ParameterTable:
    """What was found at the last step, for every parameter."""

    def __init__(self) -> None:
        self._units: dict[int, Unit] = {}
        # those whose state was only looked at, on a device where it cannot be stepped
        self._away: set[int] = set()
        self._specs: dict[int, GroupSpec] = {}
        self._layouts: dict[int, tuple[int, Any]] = {}
        self._numbers: dict[Tensor, tuple[int, int, int]] = {}

    def forget(self, param: Tensor) -> None:
        """Look at the state of a parameter anew, the next time that it is wanted."""
        for index in [i for i, unit in self._units.items() if unit.param is param]:
            del self._units[index]

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

    def gradients(self, groups: Groups, given: Mapping[int, Tensor] | None) -> list[Entry]:
        """The parameters that have gradients: those ``given`` by place, or else their own.

        Raises:
            TypeError, ValueError: a gradient is unusable, by name.
        """
        found = []
        index = 0
        layouts = self._layouts
        for number, group in enumerate(groups):
            params = group["params"]
            if given is None:
                numbered: Iterable[tuple[int, Tensor | None]] = enumerate(p.grad for p in params)
            else:
                inside = [place for place in given if index <= place < index + len(params)]
                numbered = [(place - index, given[place]) for place in sorted(inside)]
            for place, grad in numbered:
                if grad is not None:
                    at, param = index + place, params[place]
                    address = grad.data_ptr() if grad.layout is torch.strided else -1
                    layout = layout_of(grad) if address >= 0 else None
                    # a good gradient that lay and looked alike makes this one good too; where the
                    # parameter has changed, its unit is made anew, which checks again
                    if layouts.get(at) != (address, layout):
                        check_grad(at, param, grad)
                        layouts[at] = (address, layout)
                    found.append(Entry(at, number, param, grad, *layouts[at]))
            index += len(params)
        return found

    def units(
        self,
        groups: Groups,
        entries: Sequence[Entry],
        specs: Sequence[GroupSpec],
        states: dict[Tensor, Any],
        kept: StateSpec,
    ) -> list[Unit]:
        """A unit for each entry, last time's where nothing has changed.

        State that is missing is started, and state that was changed is brought into the form that
        a step takes, see ``conform``.

        Raises:
            TypeError, ValueError, RuntimeError, KeyError: what cannot be stepped, by name; no state
                has changed.
        """
        units, anew = self._units, []
        for entry in entries:
            index, group, param = entry[:3]
            spec = specs[group]
            unit = units.get(index)
            if (
                unit is None
                or unit.param is not param
                or unit.state is not states.get(param)
                or unit.formats is not spec.formats
                or unit.seed != spec.seed
                or unit.group != group
                or unit.write.dtype is not param.dtype
                or unit.moved()
                or (index in self._away and entry.grad is not None)
            ):
                anew.append(entry)
        if anew:
            self._renew(groups, anew, specs, states, kept)
        return [units[entry.number] for entry in entries]

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
            if grad is not None:
                check_grad(index, param, grad)
            moments, formats, seed = specs[number]
            write = parameter_write(kept.write, param.dtype)
            wanted = Wanted(
                f"parameter {index}",
                param,
                moments,
                formats,
                write,
                seed,
                index,
                kept.home,
                kept.counted,
                stepped=grad is not None,
            )
            state = states.get(param, {})
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
        with torch.inference_mode(False):
            share_steps(fresh)
        for entry, wanted, *_ in changes:
            index, number, param = entry[:3]
            unit = self._units[index] = Unit(
                param,
                states[param],
                wanted.moments,
                wanted.formats,
                wanted.write,
                wanted.seed,
                index,
                number,
            )
            homes = (wanted.home or param.device, param.device)
            here = all(unit.state[key].device in homes for key in unit.keys[1:])
            (self._away.discard if here else self._away.add)(index)


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
