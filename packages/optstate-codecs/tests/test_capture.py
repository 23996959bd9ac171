"""``capturable=True``: steps inside a CUDA graph, and what may not be recorded."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from subjects import EXACT, FIRST, SECOND

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.engine.capture import constant_table
from optstate_codecs.testing import SHAPES, Trainer

CODED = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
BF16 = {"exp_avg": "bf16", "exp_avg_sq": "bf16"}


pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")


def make(params, formats=CODED, **options):
    return CodedOptimizer(params, Adam(decoupled=True), formats, **options)


def a_param(numel: int = 40) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.ones(numel))
    param.grad = torch.linspace(-1, 1, numel)
    return param


@contextmanager
def recording() -> Iterator[None]:
    """Steps believe that a stream is being captured."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_initialized", "is_current_stream_capturing"):
            patch.setattr(torch.cuda, name, lambda: True)
        yield


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("triton", marks=pytest.mark.interpret, id="interpreter")]
)
@pytest.mark.parametrize("formats", [EXACT, CODED], ids=["fp32", "dynamic8"])
def test_capturable_changes_nothing_on_a_cpu(formats, backend) -> None:
    sides = [
        Trainer(lambda p, c=c: make(p, formats, backend=backend, capturable=c), SHAPES)
        for c in (False, True)
    ]
    plain, capturable = (side.run(4).tensors() for side in sides)
    assert plain.keys() == capturable.keys()
    assert all(torch.equal(value, capturable[key]) for key, value in plain.items())


def test_a_table_of_constants_holds_every_address() -> None:
    values = [2**47 + 1, 0, 512, 2**63 - 1] * 50
    table = constant_table(values, torch.device("cpu"))
    assert table.dtype == torch.int64
    assert table.tolist() == values


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_what_cannot_be_recorded_raises_and_changes_nothing(backend) -> None:
    fresh, plain, stepped = a_param(), a_param(), a_param()
    without, default = make([fresh], capturable=True), make([plain])
    warm = make([stepped], capturable=True, backend=backend)
    default.step()
    warm.step()
    before = plain.detach().clone()
    with recording():
        with pytest.raises(RuntimeError, match=r"parameter 0 has no state; before capturing, take"):
            without.step()
        with pytest.raises(RuntimeError, match="capturable=False: must be True for steps in a"):
            default.step()
        with pytest.raises(RuntimeError, match=r"parameter 0 \(torch.float32, cpu\) is stepped by"):
            warm.step()
    assert not without.state
    assert torch.equal(plain, before)
    assert torch.equal(stepped, before)


@pytest.mark.interpret
def test_a_kernel_that_was_not_warmed_up_raises() -> None:
    params = [a_param(), a_param()]
    optimizer = make(params, backend="triton", capturable=True)
    optimizer.step()
    with recording():
        params[1].grad = None
        with pytest.raises(RuntimeError, match="no step yet had exactly these gradients"):
            optimizer.step()
        params[1].grad = torch.ones(40)
        with pytest.raises(RuntimeError, match="step counts are on the host"):
            optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1


@pytest.mark.interpret
@pytest.mark.parametrize("formats", [EXACT, CODED], ids=["fp32", "dynamic8"])
def test_a_recorded_step_finds_gradients_that_have_moved(formats) -> None:
    """In the interpreter: tables as a capture makes them give what uploaded ones give."""
    kept = []

    def give(side: Trainer, time: int) -> None:
        kept.extend(param.grad for param in side.params)  # the new ones must lie elsewhere
        for i, param in enumerate(side.params):
            param.grad = side._normal(100 * time + i, param.shape).to(param.dtype)

    plain, recorded = (
        Trainer(lambda p: make(p, formats, backend="triton", capturable=True)) for _ in range(2)
    )
    for side in (plain, recorded):
        give(side, 0)
        side.optimizer.step()
    (plan,) = recorded.optimizer.executor._plans.values()
    for table in plan.tables:
        table.on_host = False  # as on a GPU, where counts lie with the parameters
        table.scalar_set = table._assign_sets()
    for side, surroundings in ((plain, nullcontext()), (recorded, recording())):
        give(side, 1)
        with surroundings:
            side.optimizer.step()
    assert recorded.optimizer.executor._captured == [plan]
    for side in (plain, recorded):
        give(side, 2)
        side.optimizer.step()
    expected = plain.tensors()
    for key, value in recorded.tensors().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


class Side:
    """Parameters, a loss over them without matrix products, and inputs a graph can read again."""

    def __init__(self, formats, dtype=torch.float32, **options) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = ((61, 83), (4097,), (256,), (0,), ())
        self.params = [
            torch.nn.Parameter(torch.randn(s, generator=generator).to("cuda", dtype))
            for s in shapes
        ]
        self.inputs = [torch.empty(s, device="cuda", dtype=dtype) for s in shapes]
        self.lr = torch.tensor(1e-2, device="cuda")
        self.optimizer = make(self.params, formats, lr=self.lr, capturable=True, **options)

    def feed(self, time: int, spoiled: bool = False) -> None:
        generator = torch.Generator().manual_seed(1 + time)
        for x in self.inputs:
            x.copy_(torch.randn(x.shape, generator=generator))
        if spoiled:
            self.inputs[1][7] = float("nan")
        self.lr.fill_(1e-2 * 0.7**time)

    def train(self) -> None:
        loss = sum(((p * x).tanh() - x).square().sum() for p, x in self.pairs())
        loss.backward()
        self.optimizer.step()

    def pairs(self):
        return zip(self.params, self.inputs, strict=True)

    def tensors(self):
        found = [param.detach() for param in self.params]
        for param in self.params:
            found += self.optimizer.state[param].values()
        return found

    def step(self, time: int, spoiled: bool = False) -> None:
        self.feed(time, spoiled)
        self.optimizer.zero_grad(set_to_none=True)
        self.train()


def capture(side: Side) -> torch.cuda.CUDAGraph:
    """Warm up with three steps on a stream of their own and record the fourth."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for time in range(3):
            side.step(time)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    side.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        side.train()
    return graph


def assert_equal(side: Side, other: Side) -> None:
    for ours, theirs in zip(side.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("formats", "dtype", "options"),
    [
        (EXACT, torch.float32, {}),
        (CODED, torch.float32, {}),
        (CODED, torch.bfloat16, {"write": "stochastic"}),
        (BF16, torch.bfloat16, {}),
        (CODED, torch.float32, {"max_grad_norm": 0.5}),
        (CODED, torch.float32, {"fused": True, "skip_nonfinite": True}),
    ],
    ids=["fp32", "dynamic8", "dynamic8-stochastic", "bf16", "clip", "skip"],
)
def test_replays_equal_steps(formats, dtype, options) -> None:
    """Rates, gradients, counts and random numbers move on with every replay."""
    recorded, plain = Side(formats, dtype, **options), Side(formats, dtype, **options)
    graph = capture(recorded)
    for time in range(3):
        plain.step(time)
    assert_equal(recorded, plain)  # recording itself has stepped nothing
    for time in range(3, 9):
        spoiled = bool(options.get("skip_nonfinite")) and time == 5
        recorded.feed(time, spoiled)
        graph.replay()
        plain.step(time, spoiled)
        assert_equal(recorded, plain)
        if "max_grad_norm" in options:
            assert torch.equal(recorded.optimizer.grad_norm, plain.optimizer.grad_norm)
    skipped = 1 if options.get("skip_nonfinite") else 0
    assert float(recorded.optimizer.state[recorded.params[0]]["step"]) == 9 - skipped


@pytest.mark.cuda
def test_replays_and_plain_steps_take_turns() -> None:
    """A step between replays moves gradients and tables; the graph keeps its own."""
    recorded, plain = Side(CODED), Side(CODED)
    graph = capture(recorded)
    for time in range(3):
        plain.step(time)
    kept = []
    for time in range(3, 11):
        if time % 2:
            recorded.feed(time)
            graph.replay()
        else:
            recorded.step(time)
            kept += [param.grad for param in recorded.params]
        torch.cuda.synchronize()
        # overwrites what was let go
        kept += [torch.full((8,), -1, device="cuda") for _ in range(64)]
        plain.step(time)
        assert_equal(recorded, plain)


@pytest.mark.cuda
def test_a_capture_survives_plans_that_come_and_go() -> None:
    recorded, plain = Side(CODED), Side(CODED)
    graph = capture(recorded)
    for time in range(3):
        plain.step(time)
    for side in (recorded, plain):
        for mask in range(1, 12):
            for i, param in enumerate(side.params):
                param.grad = torch.ones_like(param) if mask >> i & 1 else None
            side.optimizer.step()
    recorded.feed(3)
    graph.replay()
    plain.step(3)
    assert_equal(recorded, plain)


@pytest.mark.cuda
def test_two_steps_fit_into_one_graph() -> None:
    recorded, plain = Side(CODED), Side(CODED)
    capture(recorded)
    for time in range(3):
        plain.step(time)
    graph = torch.cuda.CUDAGraph()
    recorded.optimizer.zero_grad(set_to_none=True)
    recorded.feed(3)
    with torch.cuda.graph(graph):
        for _ in range(2):
            recorded.optimizer.zero_grad(set_to_none=True)
            recorded.train()
    for _ in range(2):
        graph.replay()
        plain.step(3)
        plain.step(3)
        assert_equal(recorded, plain)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_capturable_step_never_waits_for_the_device() -> None:
    side = Side(CODED, max_grad_norm=1.0, skip_nonfinite=True)
    side.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            side.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_capture_without_warm_up_raises() -> None:
    side = Side(CODED)
    side.feed(0)
    with (
        pytest.raises(RuntimeError, match="parameter 0 has no state"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        side.train()
    side.step(0)
    assert float(side.optimizer.state[side.params[0]]["step"]) == 1


@pytest.mark.cuda
def test_loaded_counts_lie_where_the_group_wants_them() -> None:
    side = Side(CODED)
    side.step(0)
    saved = {
        **side.optimizer.state_dict(),
        "state": {
            number: {key: value.cpu() for key, value in parts.items()}
            for number, parts in side.optimizer.state_dict()["state"].items()
        },
    }
    side.optimizer.load_state_dict(saved)
    side.lr = side.optimizer.param_groups[0]["lr"]
    steps = [side.optimizer.state[param]["step"] for param in side.params]
    assert all(step.is_cuda and float(step) == 1 for step in steps)
    side.step(1)
    other = Side(CODED)
    other.step(0)
    other.step(1)
    assert_equal(side, other)
