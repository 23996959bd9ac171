"""An optimizer and its twin whose state is elsewhere, held to the same steps."""

from collections.abc import Callable
from itertools import count

import torch
from torch.nn import Parameter

from optstate_codecs.offloading import offload

SHAPES = ((300, 70), (50,), (129, 257), (5,), (0,), (64, 9, 3), ())


def params(dtype=torch.float32, shapes=SHAPES) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradient(step: int, index: int, param: torch.Tensor, missing: bool = True):
    """The same numbers whoever asks; every fifth is missing."""
    if missing and (step + index) % 5 == 4:
        return None
    generator = torch.Generator().manual_seed(1000 * step + index)
    value = torch.randn(param.shape, generator=generator).to(param.dtype)
    return torch.empty_like(param).copy_(value)


class Pair:
    """The same parameters twice, and an optimizer over each, the second's state offloaded.

    Args:
        make: builds an optimizer from a list of parameters.
        build: makes the parameters.
        offloaded: False: not yet.
        options: of ``offload``.
    """

    def __init__(self, make, build: Callable = params, offloaded=True, **options) -> None:
        self.make, self.build = make, build
        self.params = build(), build()
        first, second = map(make, self.params)
        self.optimizers = first, offload(second, **options) if offloaded else second
        self.time = 0

    def each(self):
        return zip(self.params, self.optimizers, strict=True)

    def run(self, steps: int = 1, missing: bool = True) -> "Pair":
        for _ in range(steps):
            for ours, optimizer in self.each():
                run(ours, optimizer, self.time, missing)
            self.time += 1
        return self

    def check(self, what: str = "") -> None:
        assert_alike(self.params, self.optimizers, what)


def run(ours, optimizer, time: int, missing: bool = True) -> None:
    """One step with the gradients of that time."""
    for index, param in enumerate(ours):
        param.grad = gradient(time, index, param, missing) if param.requires_grad else None
    optimizer.step()


def assert_alike(both_params, both_optimizers, what: str = "") -> None:
    """Raise unless parameters and state are bitwise equal."""
    (first, second), (a, b) = both_params, both_optimizers
    for index, (mine, yours) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(mine, yours), f"{what}: parameter {index}"
        states = a.state.get(mine, {}), b.state.get(yours, {})
        assert list(states[0]) == list(states[1]), f"{what}: parameter {index}: keys"
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key]), f"{what}: parameter {index}: {key}"


class Fault(Exception):
    """What is injected."""


def injected(monkeypatch, owner, name: str, at: int, error=Fault, after: bool = False) -> list:
    """Have the call number ``at`` of a method raise, before or after it does what it does."""
    real, calls, raised = getattr(owner, name), count(), []

    def method(*args, **kwargs):
        if next(calls) != at:
            return real(*args, **kwargs)
        raised.append(at)
        if after:
            real(*args, **kwargs)
        raise error("injected")

    monkeypatch.setattr(owner, name, method)
    return raised
