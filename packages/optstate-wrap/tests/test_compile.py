"""``torch.compile`` around the step: one operation in the graph, with the step's own numbers."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from optstate_wrap import ConfigurablePolicy, OffloadOptimizer, WarmupPolicy, auto_wrap, wrap

pytestmark = pytest.mark.filterwarnings("ignore:Profiler record function")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    # a compiled function that raises inside no_grad leaves gradients off
    with torch.enable_grad():
        yield
    torch._dynamo.reset()


CODED = {"exp_avg": "int8(rounding=stochastic)", "exp_avg_sq": "oneq(bits=8)"}
MAKERS = {
    "AdamW": lambda p: auto_wrap(torch.optim.AdamW(p, lr=1e-2)),
    "from the third step": lambda p: wrap(
        torch.optim.AdamW(p, lr=1e-2), WarmupPolicy(2, min_int8_elements=1)
    ),
    "unfused": lambda p: wrap(
        torch.optim.AdamW(p, lr=1e-2), ConfigurablePolicy(CODED), fused=False
    ),
    "SGD in chunks": lambda p: wrap(
        torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        ConfigurablePolicy({"momentum_buffer": "int8"}),
        chunk_size=256,
    ),
    "no rule": lambda p: wrap(torch.optim.Adamax(p, lr=1e-2), ConfigurablePolicy(CODED)),
    "on the host": lambda p: OffloadOptimizer(torch.optim.AdamW(p, lr=1e-2), CODED),
}


def build(make):
    """A model and its optimizer, of two groups; equal ones at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 65), nn.Tanh(), nn.Linear(65, 4))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]
    return model, make(groups)


def gradients(model, time: int) -> None:
    generator = torch.Generator().manual_seed(time)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def assert_same(ours, theirs) -> None:
    for a, b in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in theirs[1].state[b].items():
            assert torch.equal(torch.as_tensor(ours[1].state[a][key]), torch.as_tensor(value))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_compiled_step_is_the_step(name, backend) -> None:
    ours, theirs = build(MAKERS[name]), build(MAKERS[name])
    step = torch.compile(lambda: ours[1].step(), backend=backend, fullgraph=True)
    for time in range(6):
        for model, _ in (ours, theirs):
            gradients(model, time)
        step()
        theirs[1].step()
        assert_same(ours, theirs)
        for _, optimizer in (ours, theirs):
            # as a scheduler does
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
    assert counters["stats"]["unique_graphs"] == 1


def test_the_method_itself_compiles_and_gradients_stay() -> None:
    ours, theirs = build(MAKERS["AdamW"]), build(MAKERS["AdamW"])
    step = torch.compile(ours[1].step, backend="aot_eager")
    for time in range(3):
        for model, _ in (ours, theirs):
            gradients(model, time)
        # of some parameters only
        ours[0][2].bias.grad = theirs[0][2].bias.grad = None
        before = [param.grad for param in ours[0].parameters()]
        step()
        theirs[1].step()
        assert all(p.grad is g for p, g in zip(ours[0].parameters(), before, strict=True))
        assert_same(ours, theirs)


def test_a_copy_steps_itself_and_other_groups_are_refused() -> None:
    model, optimizer = build(MAKERS["AdamW"])
    gradients(model, 0)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    step()
    twin = copy.deepcopy(optimizer)
    assert twin._handle != optimizer._handle
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="param_groups is another list than the compiled one"):
        step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.step()
    torch._dynamo.reset()
    step()
    assert float(optimizer.state[model[0].weight]["step"]) == 3
