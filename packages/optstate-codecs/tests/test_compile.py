"""``torch.compile`` around ``step``: one operation in the graph, no breaks, no recompilation."""

import copy
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from subjects import FIRST, SECOND
from torch._dynamo.utils import counters

from optstate_codecs import Adam, CodedOptimizer

FORMATS = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
BACKENDS = ("eager", "aot_eager")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Profiler record function"),
    # of a loss that crosses from one graph to the next
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(**options):
    """A model and its optimizer, of two groups; equal ones at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]
    return model, CodedOptimizer(groups, Adam(decoupled=True), FORMATS, lr=1e-2, **options)


def gradients(model, time: int) -> None:
    generator = torch.Generator().manual_seed(time)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def inputs(time: int):
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(time))


def change(optimizer, time: int) -> None:
    """Change what a scheduler, or a user, changes between steps."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.9
        group["betas"] = (0.9, 0.95 + 0.005 * time)
        group["initial_lr"] = 1.0


def same(model, other) -> bool:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_one_graph_compiled_once(backend) -> None:
    model, optimizer = build(max_grad_norm=1.0)
    reference, exact = build(max_grad_norm=1.0)
    step = torch.compile(lambda: optimizer.step(), backend=backend, fullgraph=True)
    for time in range(6):
        gradients(model, time)
        gradients(reference, time)
        step()
        exact.step()
        assert same(model, reference)
        assert torch.equal(optimizer.grad_norm, exact.grad_norm)
        change(optimizer, time)
        change(exact, time)
    assert counters["stats"]["unique_graphs"] == 1
    state, expected = optimizer.state_dict()["state"], exact.state_dict()["state"]
    for number, parts in expected.items():
        assert all(torch.equal(state[number][key], value) for key, value in parts.items())


def test_a_scheduler_breaks_no_graph() -> None:
    model, optimizer = build()
    reference, exact = build()
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda time: 0.5**time)
        for each in (optimizer, exact)
    ]
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=True)
    for time in range(4):
        gradients(model, time)
        gradients(reference, time)
        step()
        exact.step()
        for scheduler in schedulers:
            scheduler.step()
        assert same(model, reference)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 16)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_graph_does_around_a_step_keeps_its_order(backend) -> None:
    """The operation must see parameters and gradients as changed so far, and be seen."""

    def run(model, optimizer):
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.9)
                param.grad = param.grad * 2
                param.grad.add_(0.5)
        optimizer.step()
        return [param.detach() * 2 for param in model.parameters()]

    model, optimizer = build()
    reference, exact = build()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for time in range(3):
        gradients(model, time)
        gradients(reference, time)
        seen, expected = compiled(model, optimizer), run(reference, exact)
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
        assert same(model, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_breaks_at_backward_only(backend) -> None:
    def train(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    model, optimizer = build()
    reference, exact = build()
    compiled = torch.compile(train, backend=backend)
    for time in range(4):
        optimizer.zero_grad()
        exact.zero_grad()
        a, b = compiled(model, optimizer, inputs(time)), train(reference, exact, inputs(time))
        assert torch.equal(a, b)
        assert same(model, reference)
        change(optimizer, time)
        change(exact, time)
    reasons = [reason for reason in counters["graph_break"] if "backward" not in reason]
    assert reasons == []
    assert counters["stats"]["unique_graphs"] == 2  # before and after backward


WHOLE = """
import sys
import torch
sys.path.insert(0, {folder!r})
from test_compile import build, change, counters, inputs, same

def train(model, optimizer, x):
    for param in model.parameters():
        param.grad = None
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()

model, optimizer = build()
reference, exact = build()
torch._dynamo.config.trace_autograd_ops = True
compiled = torch.compile(train, backend="aot_eager", fullgraph=True)
for time in range(3):
    a, b = compiled(model, optimizer, inputs(time)), train(reference, exact, inputs(time))
    assert torch.equal(a, b)
    assert same(model, reference)
    change(optimizer, time)
    change(exact, time)
assert counters["stats"]["unique_graphs"] == 1
"""


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch cannot trace backward",
)
def test_a_whole_training_step_is_one_graph_where_torch_traces_backward() -> None:
    """In a process of its own: torch 2.13 remembers a graph with backward in later ones."""
    script = WHOLE.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_gradients_recompile_and_skip() -> None:
    model, optimizer = build()
    before = model[2].weight.detach().clone()
    step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    gradients(model, 0)
    model[2].weight.grad = None
    step()
    assert torch.equal(model[2].weight, before)
    gradients(model, 1)
    step()
    assert not torch.equal(model[2].weight, before)
    optimizer.zero_grad()
    step()
    assert float(optimizer.state[model[2].weight]["step"]) == 1


@pytest.fixture
def grad_mode():
    """An error inside a graph skips the end of torch's no_grad: put back what it was."""
    enabled = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(enabled)


@pytest.mark.usefixtures("grad_mode")
def test_bad_gradients_raise_from_the_graph() -> None:
    model, optimizer = build()
    step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    gradients(model, 0)
    optimizer.param_groups[0]["lr"] = -1.0
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=r"lr=-1.0: must be finite and at least 0"):
        step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.usefixtures("grad_mode")
def test_replaced_groups_raise_instead_of_stepping_the_old_ones() -> None:
    model, optimizer = build()
    step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    gradients(model, 0)
    step()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.param_groups = list(optimizer.param_groups)
    with pytest.raises(RuntimeError, match="param_groups is another list than the compiled one"):
        step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.step()
    step()
    assert float(optimizer.state[model[0].weight]["step"]) == 3
    assert copy.deepcopy(optimizer)._handle != optimizer._handle


def test_the_operation_keeps_no_optimizer_alive() -> None:
    model, optimizer = build()
    gradients(model, 0)
    handle = optimizer._handle
    params = list(model.parameters())
    grads = [param.grad for param in params]
    torch.ops.optstate.step(handle, [0, 1, 2, 3], params, grads)
    assert float(optimizer.state[params[0]]["step"]) == 1
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match="its optimizer is gone"):
        torch.ops.optstate.step(handle, [0, 1, 2, 3], params, grads)
