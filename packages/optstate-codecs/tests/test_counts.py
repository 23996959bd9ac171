"""Steps are counted in float32, and random numbers go on where that ends, at 2^24."""

import math
from itertools import pairwise

import numpy
import pytest
import torch
from subjects import FIRST, SECOND

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.counts import END, advance, as_step, counted, take_back, taken
from optstate_codecs.engine.executor import ResidentExecutor
from optstate_codecs.engine.request import ParamStep, StepRequest
from optstate_codecs.rounding import Counter, stochastic_round_bf16
from optstate_codecs.rules import SGD
from optstate_codecs.writes import parameter_write

NUMEL = 2048
BACKENDS = [
    "eager",
    "compile",
    pytest.param("triton", marks=pytest.mark.interpret, id="interpreter"),
]
LAST = float(torch.finfo(torch.float32).max)

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")


def values() -> list[float]:
    """Counts of all magnitudes, and those on both sides of every power of two from 2^22 on."""
    powers = [2.0**power for power in range(22, 40)]
    beside = [float(numpy.nextafter(numpy.float32(p), 0)) for p in powers]
    after = [float(numpy.nextafter(numpy.float32(p), numpy.inf)) for p in powers]
    between = [math.floor(1.0e7 * 1.07**n) for n in range(60)]
    between = [float(numpy.float32(n)) for n in between]
    return [0.0, 1.0, 2.0, 12345.0, 13421773.0, *beside, *powers, *after, *between, 1e30, LAST]


def due(step: float) -> float:
    """The count after ``step``: one more, or the next float32 where that is as much or more."""
    number = numpy.float32(step)
    return float(max(number + numpy.float32(1), numpy.nextafter(number, numpy.float32(numpy.inf))))


def test_a_count_moves_by_one_and_from_2_24_on_by_one_float() -> None:
    tensors = [torch.tensor(values()), torch.tensor(3.0), torch.tensor(float(END))]
    expected = [torch.tensor(n) for n in ([due(v) for v in values()], 4.0, END + 2.0)]
    start = [t.clone() for t in tensors]
    advance(tensors, plainly=False)
    assert all(map(torch.equal, tensors, expected))

    for tensor, before in zip(tensors[1:], start[1:], strict=True):
        take_back(tensor, plainly=False, skipped=torch.tensor(True))
        assert not torch.equal(tensor, before)
        take_back(tensor, plainly=False)
        assert torch.equal(tensor, before)

    skipped = [t.clone() for t in start[1:]]
    advance(skipped, plainly=False, one=torch.zeros(()))
    assert all(map(torch.equal, skipped, start[1:]))
    advance(skipped, plainly=False, one=torch.ones(()))
    assert all(map(torch.equal, skipped, expected[1:]))


def test_a_count_says_how_many_steps_were_taken() -> None:
    for count in (0, 1, END - 1, END, END + 1, END + 2, END + 2**23, 889_192_447):
        step = as_step(count)
        assert step == float(torch.tensor(step))  # a float32 number
        assert taken(step) == count
        if step < LAST:
            assert taken(due(step)) == count + 1
    assert as_step(889_192_447) == LAST
    steps = [torch.tensor(float(END - 2)) for _ in range(2)]
    found = [taken(counted(steps, plainly=False)[0]) for _ in range(5)]
    assert found == [END - 1, END, END + 1, END + 2, END + 3]
    assert counted(steps, plainly=True) == [float(step) for step in steps]


def test_where_something_else_keys_random_numbers_torch_counts() -> None:
    """As in ``torch.optim``, a count stays at 2^24 there."""
    step = torch.tensor(float(END - 1))
    assert [counted([step], plainly=True)[0] for _ in range(3)] == [float(END)] * 3
    take_back(step, plainly=True)
    assert float(step) == END - 1


def optimizer_at(step: float, backend: str, formats=None, rule=None, **options) -> CodedOptimizer:
    """One whose bfloat16 parameter, 1, has taken ``step`` steps."""
    param = torch.nn.Parameter(torch.ones(NUMEL, dtype=torch.bfloat16))
    param.grad = torch.full((NUMEL,), 1.0, dtype=torch.bfloat16)
    rule, formats = rule or SGD(), formats or {}
    optimizer = CodedOptimizer([param], rule, formats, backend=backend, **options)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(step)
    optimizer.load_state_dict(saved)
    return optimizer


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_go_on_past_2_24_steps(backend) -> None:
    """1 - 2^-9 is half-way between two numbers of bfloat16: which one is chosen, shows the draw."""
    optimizer = optimizer_at(END - 3.0, backend, lr=2.0**-9, write="stochastic")
    (param,) = optimizer.param_groups[0]["params"]
    chosen = []
    for number in range(END - 2, END + 8):
        param.data.fill_(1.0)
        optimizer.step()
        bits = Counter(0, number, 0).stream(0).bits16(NUMEL)
        expected = stochastic_round_bf16(torch.full((NUMEL,), 1 - 2.0**-9), bits)
        assert torch.equal(param, expected)
        chosen.append(param.detach() == 1)
    for place, one in enumerate(chosen):
        for other in chosen[:place]:
            # 2,048 draws: five standard deviations
            assert abs(float((one == other).double().mean()) - 0.5) <= 0.055
    step = optimizer.state[param]["step"]
    assert (step.dtype, step.shape) == (torch.float32, ())
    counts = [float(END), *(END + 2.0 * n for n in range(1, 8))]
    assert float(step) == counts[-1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_and_a_resume_give_the_same_bits(backend) -> None:
    formats = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
    options = {"formats": formats, "rule": Adam(decoupled=True), "write": "stochastic"}
    reference = optimizer_at(END - 3.0, "eager", **options)
    ours = optimizer_at(END - 3.0, backend, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        grad = torch.rand(NUMEL, generator=generator).to(torch.bfloat16) - 0.5
        if step in (2, 5):
            saved = ours.state_dict()
            before = ours.param_groups[0]["params"][0].detach().clone()
            ours = optimizer_at(1.0, backend, **options)
            ours.param_groups[0]["params"][0].data.copy_(before)
            ours.load_state_dict(saved)
        for optimizer in (reference, ours):
            optimizer.param_groups[0]["params"][0].grad = grad.clone()
            optimizer.step()
        states = [o.state[o.param_groups[0]["params"][0]] for o in (reference, ours)]
        assert float(states[0]["step"]) == float(states[1]["step"])
        if backend != "triton":  # where a code in 10,000 may differ
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
            params = [o.param_groups[0]["params"][0] for o in (reference, ours)]
            assert torch.equal(*params)
    assert taken(float(states[0]["step"])) == END + 7
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(NUMEL))])
    other.load_state_dict(ours.full_state_dict())
    other.param_groups[0]["params"][0].grad = torch.ones(NUMEL)
    other.step()
    assert other.param_groups[0]["params"][0].isfinite().all()


def test_paired_draws_are_mirrored_across_2_24() -> None:
    draws = [Counter(0, taken(as_step(n)), 0).stream(2) for n in range(END - 2, END + 4)]
    found = [draw.paired16(NUMEL) for draw in draws]
    for first, second in (found[:2], found[2:4], found[4:]):
        assert torch.equal(first, 65535 - second)
    assert not any(torch.equal(a, b) for a, b in pairwise(found))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_skipped_counts_nothing(backend) -> None:
    optimizer = optimizer_at(END + 2.0, backend, lr=0.5, fused=True)
    (param,) = optimizer.param_groups[0]["params"]
    for bad, expected in ((1.0, END + 2), (0.0, END + 4), (1.0, END + 4)):
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        assert float(optimizer.state[param]["step"]) == expected


def test_a_step_that_fails_is_not_counted(monkeypatch) -> None:
    for step in (5.0, float(END), END + 2.0):
        optimizer = optimizer_at(step, "eager", lr=0.5)
        (param,) = optimizer.param_groups[0]["params"]

        def fail(*given: object) -> None:
            raise RuntimeError("broken")

        with monkeypatch.context() as patch:
            patch.setattr("optstate_codecs.engine.eager.step_slice", fail)
            with pytest.raises(RuntimeError, match="broken"):
                optimizer.step()
        assert float(optimizer.state[param]["step"]) == step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draw", [7, END + 1, END + 2, 500_000_001])
def test_draws_that_something_else_counts_are_told_apart(backend, draw) -> None:
    """As wrapped optimizers do, which count steps in an integer."""
    param = torch.ones(NUMEL, dtype=torch.bfloat16)
    grad = torch.full((NUMEL,), 1.0, dtype=torch.bfloat16)
    rule, write = SGD(), parameter_write("stochastic", torch.bfloat16)
    param_step = ParamStep(param, {"step": torch.tensor(float(END))}, (), {}, write)
    hyper = rule.hyper({**rule.defaults(), "lr": 2.0**-9})
    request = StepRequest(rule, [param_step], [grad], [hyper], [grad.data_ptr()], draw=draw)
    ResidentExecutor(backend).step(request)
    bits = Counter(0, draw, 0).stream(0).bits16(NUMEL)
    assert torch.equal(param, stochastic_round_bf16(torch.full((NUMEL,), 1 - 2.0**-9), bits))
    assert float(param_step.state["step"]) == END


@pytest.mark.cuda
@pytest.mark.parametrize("captured", [False, True], ids=["fused", "graph"])
def test_counts_on_a_gpu_go_on_too(captured) -> None:
    formats = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
    kind = {"capturable": True} if captured else {"fused": True}
    param = torch.nn.Parameter(torch.ones(NUMEL, device="cuda", dtype=torch.bfloat16))
    param.grad = torch.full_like(param, 1.0)
    rule = Adam(decoupled=True)
    optimizer = CodedOptimizer([param], rule, formats, write="stochastic", **kind)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(END - 5.0)
    optimizer.load_state_dict(saved)
    for _ in range(2):
        optimizer.step()
    step = optimizer.step
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        step = graph.replay
    found = []
    for _ in range(8):
        step()
        found.append(taken(float(optimizer.state[param]["step"])))
    assert found == list(range(END - 2, END + 6))
    assert optimizer.state[param]["step"].is_cuda
