"""The laws can fail; ``tests-integration/suite`` checks every optimizer with them."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from subjects import EXACT, adam
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer, testing
from optstate_codecs.testing import Subject


class Drifts(CodedOptimizer):
    """Moves every parameter a little, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(1e-3)


class Spreads(CodedOptimizer):
    """Lets one NaN reach the whole tensor."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(0 * param.sum())


class Forgets(CodedOptimizer):
    """Loads a state dict without its step counts."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] += 1


class Hoards(CodedOptimizer):
    """Keeps a buffer it does not declare."""

    def step(self, closure=None):
        super().step(closure)
        for param, state in self.state.items():
            state["hidden"] = torch.zeros_like(param)


class Jitters(CodedOptimizer):
    """Draws from torch's generator."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(1 + 1e-3 * torch.rand_like(param))


class Follows(CodedOptimizer):
    """Has a number of torch's default dtype in its step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(torch.full((), 1.001))


class Stretches(CodedOptimizer):
    """Takes steps 1 % too long."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        before = [param.clone() for param in params]
        super().step(closure)
        for param, start in zip(params, before, strict=True):
            param.add_(param - start, alpha=0.01)


@pytest.mark.parametrize(
    ("law", "broken"),
    [
        (testing.zero_stays, Drifts),
        (testing.exactness, Drifts),
        (testing.locality, Spreads),
        (testing.resume, Forgets),
        (testing.resume, Jitters),
        (testing.bytes_are_said, Hoards),
        (testing.scale_equivariance, Jitters),
        (testing.unbiased_length, Stretches),
        (testing.independence, Follows),
    ],
)
def test_a_law_catches_who_breaks_it(law: Callable, broken: type[CodedOptimizer]) -> None:
    make = partial(broken, rule=Adam(), formats=EXACT)
    with pytest.raises(AssertionError):
        law(Subject("broken", make, exact=torch.optim.Adam))


def test_the_step_bound_can_fail() -> None:
    strict = Subject("strict", adam("fp32", "fp32"), max_step=0.5)
    with pytest.raises(AssertionError, match="a step of"):
        testing.positive_stays_positive(strict)


@pytest.mark.parametrize("shape", [(70000,), (3, 50000)])
def test_slices_do_not_show(shape: tuple[int, ...]) -> None:
    """A tensor of several slices steps as its blocks would alone."""
    make = adam("dynamic8(block_size=16)", "dynamic8(block_size=16, signed=False)")
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole, tail = Parameter(torch.zeros(shape)), Parameter(torch.zeros(grad.numel() - 65536))
    first, second = make([whole]), make([tail])
    whole.grad, tail.grad = grad, grad.view(-1)[65536:].clone()
    for _ in range(3):
        first.step()
        second.step()
    assert torch.equal(whole.detach().view(-1)[65536:], tail.detach())
