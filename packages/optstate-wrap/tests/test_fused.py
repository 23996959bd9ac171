"""Coded state stepped by the codecs' engine: as through the inner optimizer, and only where due."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import Parameter

from optstate_wrap import (
    ConfigurablePolicy,
    OptimizerWrapper,
    Policy,
    StepError,
    wrap_low_memory_adamw,
    wrap_max_compression_adamw,
)

SHAPES = ((96, 50), (37,), (2100,), (8, 3, 5, 5))
TWO = {
    "exp_avg": "int8(rounding=stochastic, units=update)",
    "exp_avg_sq": "oneq(bits=8, block_size=256)",
}
FORMATS = {
    "int8": {"exp_avg": "int8"},
    "update-exact-second": {"exp_avg": "int8(rounding=stochastic, units=update)"},
    "both": TWO,
    "4bit": {
        "exp_avg": "int4(rounding=paired, units=update)",
        "exp_avg_sq": "minifloat(exponent_bits=2, mantissa_bits=2, rounding=stochastic)",
    },
    "bf16": {"exp_avg": "bf16", "exp_avg_sq": "bf16"},
    "fp16": {"exp_avg": "fp16(block_size=64)"},
}
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, foreach=False)
OPTIMIZERS = {
    "adamw": ADAMW,
    "adam": partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1, foreach=False),
    "maximize": partial(ADAMW, maximize=True),
    "amsgrad": partial(ADAMW, amsgrad=True),
}


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend := getattr(request, "param", None):
        monkeypatch.setenv("OPTSTATE_BACKEND", backend)


def backends() -> list:
    interpret = pytest.param("triton", marks=pytest.mark.interpret, id="interpreter")
    return ["eager", "compile", interpret]


class Run:
    """Parameters, a wrapped optimizer, and a stream of gradients, one of which is missing."""

    def __init__(self, make, policy, chunk=4096, device="cpu", dtype=torch.float32, **options):
        noise = torch.Generator().manual_seed(0)
        starts = [torch.randn(shape, generator=noise) for shape in SHAPES]
        self.params = [Parameter(start.to(device, dtype)) for start in starts]
        groups = [{"params": self.params[:2], "lr": 3e-3}, {"params": self.params[2:]}]
        inner = make(groups)
        self.optimizer = OptimizerWrapper(inner, policy, chunk, **options)
        self.step = 0

    def run(self, steps: int):
        for _ in range(steps):
            noise = torch.Generator().manual_seed(self.step)
            for number, param in enumerate(self.params):
                grad = torch.randn(param.shape, generator=noise).to(param)
                param.grad = None if (self.step + number) % 4 == 3 else grad
            self.optimizer.step()
            self.step += 1
        return self

    @property
    def fused_parameters(self) -> int:
        prepared = self.optimizer.engine.fused._prepared.values()
        return sum(bool(entry.param_steps) for entry in prepared)


def assert_alike(ours: Run, theirs: Run, rate: float = 2e-3) -> None:
    """Parameters and state are the same, but for a few codes that fell on the other side."""
    for mine, yours in zip(ours.params, theirs.params, strict=True):
        state = {"": yours, **theirs.optimizer.state[yours]}
        for key, value in {"": mine, **ours.optimizer.state[mine]}.items():
            got, expected = value.detach().cpu(), state[key].detach().cpu()
            apart = ~torch.isclose(got, expected, rtol=1e-4, atol=1e-6)
            assert int(apart.sum()) <= max(2, rate * got.numel()), key
            torch.testing.assert_close(got, expected, rtol=0.2, atol=2e-2)


needs_no_interpreter = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")


@needs_no_interpreter
@pytest.mark.parametrize("_backend", backends(), indirect=True)
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_as_through_the_inner_optimizer(_backend, formats) -> None:
    sides = [
        Run(ADAMW, ConfigurablePolicy(formats, warmup_steps=2), 1024, fused=fused).run(7)
        for fused in (None, False)
    ]
    assert sides[0].fused_parameters == len(SHAPES)
    assert sides[1].fused_parameters == 0
    assert_alike(*sides)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_kind_of_adam(make) -> None:
    coded = {**TWO, "max_exp_avg_sq": "oneq(bits=8)"}
    sides = [Run(make, ConfigurablePolicy(coded), fused=fused).run(6) for fused in (None, False)]
    assert sides[0].fused_parameters == len(SHAPES)
    assert_alike(*sides)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.3}], ids=str)
def test_sgd(options) -> None:
    make = partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=False, **options)
    policy = {"momentum_buffer": "int8(rounding=stochastic)"}
    sides = [Run(make, ConfigurablePolicy(policy), fused=fused).run(6) for fused in (None, False)]
    assert sides[0].fused_parameters == len(SHAPES)
    assert_alike(*sides)


def test_parts_of_a_tensor_draw_as_the_whole() -> None:
    """Whatever the chunks are: random numbers follow from an element's place in its parameter."""
    runs = [Run(ADAMW, ConfigurablePolicy(TWO), chunk).run(5) for chunk in (512, 1 << 20)]
    for one, other in zip(*(run.params for run in runs), strict=True):
        assert torch.equal(one, other)


class Half(torch.optim.AdamW):
    """Not AdamW, whatever it inherits."""


class Looks(Policy):
    def get_codecs(self, param, state, step):
        return TWO if float(state["exp_avg_sq"].max()) >= 0 else {}


class Counts(Policy):
    def get_codecs(self, param, state, step):
        return TWO if len(state) == 3 and "step" in state else {}


@pytest.mark.parametrize(
    ("make", "policy", "options", "taken"),
    [
        (ADAMW, ConfigurablePolicy({}), {}, False),
        (ADAMW, ConfigurablePolicy(TWO), {"fused": False}, False),
        (ADAMW, ConfigurablePolicy(TWO), {"store": "host"}, True),
        (ADAMW, ConfigurablePolicy(TWO), {"dtype": torch.bfloat16}, False),
        (ADAMW, ConfigurablePolicy(TWO), {"dtype": torch.bfloat16, "fused": True}, True),
        (partial(Half, lr=1e-2), ConfigurablePolicy(TWO), {}, False),
        (partial(torch.optim.NAdam), ConfigurablePolicy(TWO), {}, False),
        (ADAMW, Looks(), {}, False),
        (ADAMW, Counts(), {}, True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_where_it_is_done(make, policy, options, taken) -> None:
    run = Run(make, policy, **options).run(3)
    assert bool(run.fused_parameters) is taken


@pytest.mark.parametrize("variance", ["fp16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_presets_step_every_dtype_in_it(dtype, variance) -> None:
    param = Parameter(torch.randn(64, 64).to(dtype))
    low = partial(wrap_low_memory_adamw, warmup_steps=1, variance_mode=variance)
    for make in (low, wrap_max_compression_adamw):
        # smaller ones are zero in float16, where the first steps are torch's
        optimizer = make([param], lr=1e-3, eps=1e-4)
        for _ in range(4):
            before = param.detach().clone()
            param.grad = torch.randn_like(param)
            optimizer.step()
        assert optimizer.engine.fused._prepared[param].param_steps
        moved = (param.detach().double() - before.double()).abs().max()
        assert 0 < moved < 0.02


def test_new_hyperparameters_and_weights_reach_it() -> None:
    sides = [
        Run(ADAMW, ConfigurablePolicy(TWO), 1024, fused=fused).run(3) for fused in (None, False)
    ]
    for side in sides:
        side.optimizer.param_groups[1].update(lr=0.1, betas=(0.5, 0.9), weight_decay=0.0)
        for param in side.params:
            param.data = param.detach() * 2  # elsewhere in memory
        side.run(3)
    assert_alike(*sides)


def test_resumes_bit_for_bit_and_copies_go_their_own_way() -> None:
    policy = ConfigurablePolicy(TWO, warmup_steps=1)
    whole = Run(ADAMW, policy, 1024).run(9)
    first = Run(ADAMW, policy, 1024).run(5)
    twin = copy.deepcopy(first)
    second = Run(ADAMW, policy, 1024)
    second.optimizer.load_state_dict(first.optimizer.packed_state_dict())
    for mine, yours in zip(second.params, first.params, strict=True):
        mine.data.copy_(yours.data)
    second.step = first.step
    saved = first.optimizer.packed_state_dict()
    before = copy.deepcopy(saved)
    first.run(2)  # must reach neither what was saved nor what was copied
    for number, state in before["state"].items():
        for record, kept in zip(state["parts"], saved["state"][number]["parts"], strict=True):
            for part, same in zip(
                record["exp_avg"]["parts"], kept["exp_avg"]["parts"], strict=True
            ):
                assert torch.equal(part, same)
    for run in (second, twin):
        run.run(4)
        for expected, got in zip(whole.params, run.params, strict=True):
            assert torch.equal(expected, got)


@pytest.mark.parametrize("when", ["before", "counted", "after"])
def test_an_exception_leaves_all_before_or_after(when, monkeypatch) -> None:
    run = Run(ADAMW, ConfigurablePolicy(TWO), 1024).run(3)
    session, after = run.optimizer.engine.fused._executor, when == "after"
    original = session._run

    def failing(request):
        if after:
            original(request)
        if when == "counted":
            for param_step in request.param_steps[1:]:
                param_step.state["step"] += 1
                request.counted.append(param_step)
        raise OSError("no more")

    expected = copy.deepcopy(run).run(1 if after else 0)
    monkeypatch.setattr(session, "_run", failing)
    with pytest.raises(
        StepError, match=r"step stopped in chunk 1 of 1 \(fused\): OSError"
    ) as caught:
        run.run(1)
    assert bool(caught.value.stepped) is after
    for ours, theirs in zip(run.params, expected.params, strict=True):
        assert torch.equal(ours, theirs)
        mine, yours = run.optimizer.state[ours], expected.optimizer.state[theirs]
        assert all(torch.equal(mine[key], yours[key]) for key in mine)


def test_a_scaler_skips_and_unscales_in_it() -> None:
    make = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    run = Run(make, ConfigurablePolicy(TWO)).run(2)
    plain = copy.deepcopy(run)
    before = [param.detach().clone() for param in run.params]
    for scale, found in ((4.0, 1.0), (4.0, 0.0)):
        for param, other in zip(run.params, plain.params, strict=True):
            other.grad = torch.ones_like(other)
            param.grad = torch.ones_like(param) * scale
        run.optimizer.grad_scale = torch.tensor(scale)
        run.optimizer.found_inf = torch.tensor(found)
        run.optimizer.step()
        if found:
            assert all(map(torch.equal, before, run.params))
            assert float(run.optimizer.state[run.params[0]]["step"]) == 2
    plain.optimizer.engine.encoder.steps += 1  # what was skipped has drawn
    plain.optimizer.step()
    for ours, theirs in zip(run.params, plain.params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_on_a_gpu(formats) -> None:
    sides = [
        Run(ADAMW, ConfigurablePolicy(formats, warmup_steps=2), 1024, "cuda", fused=fused).run(7)
        for fused in (None, False)
    ]
    assert sides[0].fused_parameters == len(SHAPES)
    assert_alike(*sides)
