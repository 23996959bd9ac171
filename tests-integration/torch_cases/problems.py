"""Parameters, their gradients and an optimizer over them: what the cases are run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from family import Subject
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

__all__ = ["Problem", "after", "assert_equal", "compare"]

#: matrices, which any class takes; longer than a block, and odd
SHAPES = ((20, 15), (7, 3))


Build = Callable[[list[Parameter]], Optimizer]
Lay = Callable[[Tensor], Tensor]


@lru_cache(maxsize=1024)
def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers, float64, the same for the same seed; not to be changed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Problem:
    """Parameters that are drawn to a target by noisy gradients, the same for the same step.

    Args:
        subject: which gradients it takes, and how it is stepped.
        build: makes the optimizer from the parameters.
        shapes: of the parameters.
        dtypes, devices: of the parameters, one after the other and over again.
        wide: keep parameters of all dtypes in float64, with the same values.
        lay: lays a parameter's values out in memory.
        sparse: whether gradients are, also where the subject does not ask for that.
    """

    def __init__(
        self,
        subject: Subject,
        build: Build,
        *,
        shapes: Sequence[Sequence[int]] = SHAPES,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        wide: bool = False,
        devices: Sequence[str] = ("cpu",),
        lay: Lay = torch.clone,
        sparse: bool = False,
    ) -> None:
        self.subject = subject
        self.sparse = sparse or subject.sparse
        self.params = []
        for seed, shape in enumerate(shapes):
            device, dtype = devices[seed % len(devices)], dtypes[seed % len(dtypes)]
            values = normal(tuple(shape), seed).to(device, dtype, copy=True)
            self.params.append(Parameter(lay(values.double() if wide else values)))
        self.optimizer = build(self.params)
        self.time = 0

    def gradient(self, index: int) -> Tensor:
        """A parameter's gradient at this step: towards the target, with some noise."""
        param = self.params[index].detach()
        towards = normal(param.shape, 100 + index) * 2 + normal(param.shape, 200 + self.time) / 4
        grad = self.subject.gradient(param - towards.to(param))
        return grad.to_sparse() if self.sparse else grad

    def evaluate(self) -> Tensor:
        """Set every gradient; a loss of which they are about the gradient."""
        for index, param in enumerate(self.params):
            param.grad = self.gradient(index)
        grads = [param.grad.to_dense().abs().double().cpu() for param in self.params]
        return sum(grad.square().sum() / 2 for grad in grads)

    def run(self, steps: int = 1) -> Problem:
        """Take some steps; every third, from the second on, lacks the last parameter's gradient."""
        for _ in range(steps):
            if self.subject.needs_closure:
                self.optimizer.step(self.evaluate)
            else:
                self.evaluate()
                if self.time % 3 == 1:
                    self.params[-1].grad = None
                self.optimizer.step()
            self.time += 1
        return self

    def values(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [param.detach().clone() for param in self.params]


def compare(
    subject: Subject,
    ours: Build,
    exact: Build,
    steps: int = 3,
    between: Callable[[Optimizer], None] = lambda optimizer: None,
    slack: Sequence[float] = (0.0,),
    lay: Lay = torch.clone,
    lay_exact: Lay | None = None,
    **options: Any,
) -> None:
    """Raise unless both end where the subject says: bit by bit the same, or that close.

    Args:
        subject: says how close, and which gradients there are.
        ours, exact: build the two optimizers.
        steps: taken with each.
        between: called with each optimizer after each of its steps.
        slack: added to what the subject allows, for one parameter after the other and over again;
            with any, the exact optimizer steps in float64.
        lay: lays out the parameters of both, unless there is ``lay_exact`` for the second.
        **options: of both problems.
    """
    wide = any(slack)
    first = Problem(subject, ours, lay=lay, **options)
    pair = first, Problem(subject, exact, wide=wide, lay=lay_exact or lay, **options)
    start = pair[0].values()
    for problem in pair:
        for _ in range(steps):
            problem.run()
            between(problem.optimizer)
    if not subject.error and not wide:
        assert_equal(pair[0].values(), pair[1].values(), "params")
        return
    ends = zip(pair[0].values(), pair[1].values(), start, strict=True)
    for number, (mine, theirs, before) in enumerate(ends):
        off, allowed = distance(mine, theirs, before), subject.error + slack[number % len(slack)]
        assert off <= allowed, f"parameter {number}: {off:.3g} off, at most {allowed:.3g} allowed"


def distance(mine: Tensor, theirs: Tensor, before: Tensor) -> float:
    """How far one is from the other, relative to how far that went; 0 where nothing is."""
    mine, theirs, before = (t.to(torch.complex128) for t in (mine, theirs, before))
    return float((mine - theirs).norm() / (theirs - before).norm().clamp(min=1e-30))


@lru_cache(maxsize=256)
def after(subject: Subject, steps: int) -> list[Tensor]:
    """The parameters after some steps of the optimizer as it is by default; not to be changed."""
    return Problem(subject, subject.make).run(steps).values()


def assert_equal(left: Any, right: Any, where: str = "") -> None:
    """Raise unless both are the same, bit by bit, with NaN equal to NaN."""
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor), where
        assert (left.dtype, left.shape) == (right.dtype, right.shape), where
        assert torch.equal(left.nan_to_num(nan=12345.0), right.nan_to_num(nan=12345.0)), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), f"{where}: {list(left)} and {list(right)}"
        for key in left:
            assert_equal(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal(one, other, f"{where}[{number}]")
    else:
        assert left == right, f"{where}: {left!r} and {right!r}"
