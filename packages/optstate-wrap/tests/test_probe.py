"""The probe tells what may be stepped in chunks and in parts, and finds out those that may not."""

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate_wrap import ConfigurablePolicy, wrap
from optstate_wrap.probe import probe


class Simple(Optimizer):
    """Gradient descent, with what a test puts into ``scale``."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.calls = 0

    def scale(self, param):
        return 1.0

    def begin(self):
        pass

    @torch.no_grad()
    def step(self, closure=None):
        self.begin()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"] * float(self.scale(param)))


class GlobalNorm(Simple):
    def begin(self):
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        self.norm = torch.stack([g.norm() for g in grads]).norm() if grads else 1.0

    def scale(self, param):
        return 1 / self.norm


class LayerNorm(Simple):
    def scale(self, param):
        return param.norm() / param.grad.norm()


class CountsInAttribute(Simple):
    def begin(self):
        self.calls += 1

    def scale(self, param):
        return 1 / self.calls


class CountsInGroup(Simple):
    def begin(self):
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1

    def scale(self, param):
        return 1 / self.param_groups[0]["calls"]


class GlobalState(Simple):
    def begin(self):
        self.state["all"]["calls"] = self.state["all"].get("calls", 0) + 1

    def scale(self, param):
        return 1 / self.state["all"]["calls"]


class MovesWithoutGradient(Simple):
    def begin(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(0.9)


class NeedsFirstGroup(Simple):
    def begin(self):
        self.first = self.param_groups[0]["params"][0]

    def scale(self, param):
        return self.first.norm()


EXPECTED = {
    Simple: (True, True),
    GlobalNorm: (False, False),
    LayerNorm: (True, False),
    CountsInAttribute: (False, False),
    CountsInGroup: (True, True),
    GlobalState: (False, False),
    MovesWithoutGradient: (False, False),
    NeedsFirstGroup: (False, False),
}


@pytest.mark.parametrize(
    ("cls", "expected"), EXPECTED.items(), ids=lambda c: getattr(c, "__name__", "")
)
def test_adversaries(cls, expected) -> None:
    found = probe(cls([Parameter(torch.ones(4))]))
    assert (found.chunked, found.splittable) == expected


def test_lbfgs_is_neither() -> None:
    found = probe(torch.optim.LBFGS([Parameter(torch.ones(4))]))
    assert (found.chunked, found.splittable) == (False, False)


@pytest.mark.parametrize("name", ["Muon"])
def test_matrix_optimizers_are_not_split(name) -> None:
    cls = getattr(torch.optim, name, None)
    if cls is None:
        pytest.skip(f"this torch has no {name}")
    found = probe(cls([Parameter(torch.ones(4, 4))]))
    assert (found.chunked, found.splittable) == (True, False)


def test_leaves_optimizer_and_generator_alone() -> None:
    param = Parameter(torch.ones(4))
    inner = torch.optim.Adam([param], lr=0.0, betas=(0.7, 0.9))
    before, generator = dict(inner.param_groups[0]), torch.get_rng_state()
    probe(inner)
    assert inner.param_groups[0] == before
    assert not inner.state
    assert torch.equal(param, torch.ones(4))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    "cls", [c for c, found in EXPECTED.items() if not found[0]], ids=lambda c: c.__name__
)
def test_unsafe_is_stepped_whole_with_one_warning_or_refused(problem, same, cls) -> None:
    plain = problem(lambda groups: cls(groups, lr=1e-2)).run(4)
    with pytest.warns(UserWarning, match=f"{cls.__name__} cannot be stepped in chunks") as seen:
        ours = problem(lambda groups: wrap(cls(groups, lr=1e-2), ConfigurablePolicy({}))).run(4)
    assert len(seen) == 1
    ours.optimizer.add_param_group({"params": [Parameter(torch.ones(3))]})
    del ours.optimizer.param_groups[-1]
    same(plain, ours)
    with pytest.raises(ValueError, match="cannot be stepped in chunks"):
        wrap(cls([Parameter(torch.ones(4))]), strict=True)


def test_closure_reaches_an_optimizer_that_calls_it_often() -> None:
    results = []
    for wrapped in (False, True):
        param = Parameter(torch.tensor([3.0, -2.0]))
        optimizer = torch.optim.LBFGS([param], lr=0.5, max_iter=4)
        if wrapped:
            with pytest.warns(UserWarning, match="LBFGS"):
                optimizer = wrap(optimizer)

        def closure(param=param, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (param**4).sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        results.append((losses, param.detach()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
