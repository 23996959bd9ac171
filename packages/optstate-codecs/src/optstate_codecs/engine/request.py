"""What the engine is given: each parameter's share of a step, and what changes every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optstate_codecs import counts
from optstate_codecs.formats import FP32, Format
from optstate_codecs.rules import Moment, Rule
from optstate_codecs.state.layout import Declaration, bound, is_dense, same_order
from optstate_codecs.writes import MASTER, Write

__all__ = ["GradMeans", "ParamStep", "StepRequest", "layout_of", "trainable"]


@dataclass(frozen=True, eq=False)
class ParamStep:
    """One parameter, and everything about its step that stays the same from step to step.

    Loops and kernels read and write memory at addresses that were noted once for each unit. So
    whoever keeps a unit between steps asks whether it has ``moved``, and makes another one if so.

    Attributes:
        param: the parameter, any real floating dtype and layout.
        state: ``optimizer.state[param]``: ``step`` and the components of every moment and of the
            write.
        moments: the rule's moments, in its order.
        formats: the format of each moment, as the group has them; ``bound`` to the parameter they
            say what is stored.
        write: how the parameter is read and written.
        seed: the optimizer's ``rounding_seed``.
        index: the parameter's place in the optimizer, counted over all groups.
        group: the number of its param group.
        offset: the place of the first element in what random numbers are counted over: not 0 where
            the parameter is a part of a larger one. A multiple of 16.
        stage: units of one stage are stepped together, and stages one after the other.
    """

    param: Tensor
    state: dict[str, Any]
    moments: tuple[Moment, ...]
    formats: Mapping[str, Format]
    write: Write
    seed: int = 0
    index: int = 0
    group: int = 0
    offset: int = 0
    stage: int = 0
    _noted: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self.note()

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys of the state that a step uses: the count, then the components in order."""
        stored = self.stored.items()
        return ("step", *(c.key(name) for name, declared in stored for c in declared.components))

    def note(self) -> None:
        """Take where parameter and state are now for where they belong."""
        self._noted[:] = self._where()

    def moved(self) -> bool:
        """Whether parameter or state are elsewhere in memory, or of another shape, than noted.

        That is so too where entries were added to the state, or taken from it.
        """
        try:
            return self._noted != self._where()
        except (KeyError, AttributeError):
            return True

    def _where(self) -> list[Any]:
        param, state = self.param, self.state
        own = (len(state), param.data_ptr(), param.shape, param.stride())
        return [*own, *[state[key].data_ptr() for key in self.keys]]

    @property
    def bound(self) -> dict[str, Format]:
        """The format of each moment as it stores one of the parameter's shape."""
        return bound(self.formats, self.param)

    @property
    def plain(self) -> bool:
        """Whether all moments are stored in float32, and nothing is rounded at random."""
        stored = self.bound.values()
        return all(isinstance(f, FP32) for f in stored) and not self.write.uses_random

    @property
    def stored(self) -> dict[str, Declaration]:
        """What declares the components of the state: each moment's format, then the write."""
        return {**self.bound, MASTER: self.write}

    @property
    def parts(self) -> list[Tensor]:
        """The components of the state, in order."""
        return [self.state[c.key(name)] for name, d in self.stored.items() for c in d.components]

    def in_one_order(self, grad: Tensor) -> bool:
        """Whether parameter, gradient and state are dense and lie alike, element after element."""
        return (
            self.param.stride() == grad.stride()
            and is_dense(self.param)
            and all(
                same_order(self.state[c.key(name)], c, self.param)
                for name, declared in self.stored.items()
                for c in declared.components
            )
        )


@dataclass(frozen=True)
class GradMeans:
    """The means that gradient centralization subtracts from the gradients of a step.

    Attributes:
        values: on each device, all means in one float32 vector.
        starts: where a gradient's means begin in its device's vector; -1 where it has none.
    """

    values: dict[torch.device, Tensor]
    starts: Sequence[int]

    def expanded(self, position: int, grad: Tensor) -> Tensor | None:
        """The mean for each element of ``grad``, as an expanded view; None where it has none."""
        start = self.starts[position]
        if start < 0:
            return None
        means = self.values[grad.device][start : start + grad.shape[0]]
        return means.view(-1, *[1] * (grad.dim() - 1)).expand_as(grad)


@dataclass
class StepRequest:
    """One step.

    Attributes:
        rule: the mathematics.
        param_steps: the parameters that have a gradient.
        grads: the gradient of each: same shape and device, any real floating dtype.
        hypers: each group's validated hyper-parameters, as ``rule.hyper`` returns them.
        addresses: of the gradients' first elements.
        layouts: ``layout_of`` each gradient, the same object where it is the same; empty where
            they are to be found out.
        factor: what gradients are multiplied with, 0-d, or None; read on its device.
        grad_means: the means subtracted from gradients before that, or None.
        draw: what keys random numbers in place of the step counts, at least 0, or None.
        done: units that have been stepped, for who wants to know after an exception.
        counted: units whose step count has been raised.
        found_inf: non-zero where the step is to be skipped, or None; read on its device.
        staging: what is around the stepping of a stage: brings its state, and takes it back.
        apart: whether what follows on the current stream is not to wait until ``join``;
            parameters and gradients must be left alone until then.
        total: elements of all parameters that may be stepped, by which the backend is chosen, so
            that it is the same for every part of a step; 0: of ``param_steps``.
    """

    rule: Rule
    param_steps: Sequence[ParamStep]
    grads: Sequence[Tensor]
    hypers: Sequence[Any]
    addresses: Sequence[int] = ()
    layouts: Sequence[Any] = ()
    factor: Tensor | None = None
    found_inf: Tensor | None = None
    grad_means: GradMeans | None = None
    draw: int | None = None
    total: int = 0
    done: list[ParamStep] = field(default_factory=list)
    counted: list[ParamStep] = field(default_factory=list)
    staging: Callable[[int], AbstractContextManager[object]] | None = None
    apart: bool = False

    def around(self, stage: int) -> AbstractContextManager[object]:
        """What a stage is stepped in."""
        return nullcontext() if self.staging is None else self.staging(stage)

    def stages(self) -> Iterator[tuple[int, StepRequest]]:
        """The stages in order, each with its share of the step."""
        members: dict[int, list[int]] = {}
        for place, param_step in enumerate(self.param_steps):
            members.setdefault(param_step.stage, []).append(place)
        for stage, places in sorted(members.items()):
            yield stage, self if len(members) == 1 else self.part(places)

    def uncount(self) -> None:
        """Put back the counts of units that were to be stepped and have not been."""
        stepped = set(map(id, self.done))
        for param_step in self.counted:
            if id(param_step) not in stepped:
                step = param_step.state["step"]
                skipped = None if self.found_inf is None else (self.found_inf != 0).to(step.device)
                counts.take_back(step, self.draw is not None, skipped)

    def part(self, places: Sequence[int]) -> StepRequest:
        """The same step of the units at ``places`` only."""
        means = self.grad_means
        return replace(
            self,
            param_steps=[self.param_steps[place] for place in places],
            grads=[self.grads[place] for place in places],
            addresses=[self.addresses[place] for place in places] if self.addresses else (),
            layouts=[self.layouts[place] for place in places] if self.layouts else (),
            grad_means=means and replace(means, starts=[means.starts[p] for p in places]),
        )


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """What decides, besides its address, which memory a tensor's elements have."""
    return tensor.dtype, tensor.shape, tensor.stride()


def trainable(groups: Sequence[Mapping[str, Any]]) -> int:
    """Elements of all parameters in ``groups`` that require gradients."""
    return sum(p.numel() for group in groups for p in group["params"] if p.requires_grad)
