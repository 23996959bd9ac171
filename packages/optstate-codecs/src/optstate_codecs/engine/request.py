"""Step requests: the parameters, state and gradients of one step, as the engine takes them."""

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
    """One parameter with its state, and all settings of its step that stay the same between steps.

    Kernels read and write memory at addresses that are taken once for each ``ParamStep``. Code that
    keeps one between steps has to check ``moved`` and, where that is true, make a new one.

    Attributes:
        param: the parameter, any real floating dtype and layout.
        state: ``optimizer.state[param]``: ``step`` and the components of every moment and of the
            write.
        moments: the rule's moments, in its order.
        formats: the format of each moment, as the group has them. ``bound`` gives them for the
            parameter's shape.
        write: how the parameter is read and written.
        seed: the optimizer's ``rounding_seed``.
        index: the parameter's index in the optimizer, counted over all groups.
        group: the index of its param group.
        offset: the index of the first element in the numbering of random numbers, a multiple of 16:
            not 0 where the parameter is a part of a larger one.
        stage: parameters of one stage are stepped together, and stages one after the other.
        key: keys random numbers beside the seed, 0 to 2^63 - 1 (see ``rounding_keys``); -1: the
            index.
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
    key: int = -1
    _noted: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.key < 0:
            object.__setattr__(self, "key", self.index)
        self.note()

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The state keys that a step uses: the step count, then the components in order."""
        stored = self.stored.items()
        return ("step", *(c.key(name) for name, declared in stored for c in declared.components))

    def note(self) -> None:
        """Note the current addresses and layouts, which ``moved`` compares with."""
        self._noted[:] = self._where()

    def moved(self) -> bool:
        """Whether an address, the parameter's layout or the number of state entries has changed."""
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
        """The format of each moment, bound to the parameter's shape."""
        return bound(self.formats, self.param)

    @property
    def plain(self) -> bool:
        """Whether all moments are float32 and nothing is rounded stochastically."""
        stored = self.bound.values()
        return all(isinstance(f, FP32) for f in stored) and not self.write.uses_random

    @property
    def stored(self) -> dict[str, Declaration]:
        """The declarations of the state's components: each moment's format, then the write."""
        return {**self.bound, MASTER: self.write}

    @property
    def parts(self) -> list[Tensor]:
        """The components of the state, in order."""
        return [self.state[c.key(name)] for name, d in self.stored.items() for c in d.components]

    def in_one_order(self, grad: Tensor) -> bool:
        """Whether parameter, gradient and state are dense with their elements in the same order."""
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
    """One step of some parameters.

    Attributes:
        rule: the update rule.
        param_steps: the parameters that have a gradient.
        grads: the gradient of each: same shape and device, any real floating dtype.
        hypers: each group's validated hyper-parameters, as ``rule.hyper`` returns them.
        addresses: of the gradients' first elements.
        layouts: ``layout_of`` each gradient, the same object where it is the same; empty: the
            engine computes them.
        factor: multiplies the gradients; 0-d, read on its device; or None.
        grad_means: the means subtracted from the gradients before that, or None.
        draw: keys the random numbers in place of the step counts, at least 0; or None.
        done: those that have been stepped; valid after an exception too.
        torn: those of which only some elements have been stepped; valid after an exception too.
        counted: those whose step count has been incremented.
        found_inf: non-zero skips the step; 0-d, read on its device; or None.
        staging: makes the context in which a stage is stepped, which loads and stores its state.
        asynchronous: later work on the current stream need not wait for the step until ``join``;
            parameters and gradients must not be used until then.
        total: elements of all parameters of the whole step, which ``param_steps`` are a part of.
            The choice of backend depends on it, so that it is the same for every part. 0: the
            elements of ``param_steps``.
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
    torn: list[ParamStep] = field(default_factory=list)
    counted: list[ParamStep] = field(default_factory=list)
    staging: Callable[[int], AbstractContextManager[object]] | None = None
    asynchronous: bool = False

    def around(self, stage: int) -> AbstractContextManager[object]:
        """The context in which a stage is stepped."""
        return nullcontext() if self.staging is None else self.staging(stage)

    def stages(self) -> Iterator[tuple[int, StepRequest]]:
        """The stages in order, each with its share of the step."""
        members: dict[int, list[int]] = {}
        for position, param_step in enumerate(self.param_steps):
            members.setdefault(param_step.stage, []).append(position)
        for stage, positions in sorted(members.items()):
            yield stage, self if len(members) == 1 else self.part(positions)

    def uncount(self) -> None:
        """Decrement the step counts of parameters that were counted but not stepped."""
        stepped = set(map(id, self.done))
        for param_step in self.counted:
            if id(param_step) not in stepped:
                step = param_step.state["step"]
                skipped = None if self.found_inf is None else (self.found_inf != 0).to(step.device)
                counts.take_back(step, self.draw is not None, skipped)

    def part(self, positions: Sequence[int]) -> StepRequest:
        """The same step of the parameters at ``positions`` only."""
        means = self.grad_means
        return replace(
            self,
            param_steps=[self.param_steps[p] for p in positions],
            grads=[self.grads[p] for p in positions],
            addresses=[self.addresses[p] for p in positions] if self.addresses else (),
            layouts=[self.layouts[p] for p in positions] if self.layouts else (),
            grad_means=means and replace(means, starts=[means.starts[p] for p in positions]),
        )


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """Dtype, shape and strides: with its address, they say where a tensor's elements lie."""
    return tensor.dtype, tensor.shape, tensor.stride()


def trainable(groups: Sequence[Mapping[str, Any]]) -> int:
    """Elements of all parameters in ``groups`` that require gradients."""
    return sum(p.numel() for group in groups for p in group["params"] if p.requires_grad)
