"""Torch's default dtype and device change nothing, for every preset, policy and store.

What a wrapped optimizer makes for itself is its own: torch's keep step counts in the default dtype
where that is float64, and older ones put them on the default device. So counts are compared as
numbers, and where the default device is "meta", as while a model is built, state is made before.
"""

from contextlib import suppress
from functools import partial

import pytest
import torch
from host_nets import Pretends
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import Parameter

from optstate_codecs import CodedOptimizer
from optstate_codecs.rules import Adam
from optstate_codecs.testing import DEFAULTS, tensors_in, torch_defaults
from optstate_codecs.testing.subject import assert_same
from optstate_wrap import (
    AdaptiveWarmupPolicy,
    BF16Codec,
    ConfigurablePolicy,
    FP16Codec,
    FP32Codec,
    Int8MomentumCodec,
    OffloadOptimizer,
    WarmupPolicy,
    auto_wrap,
    probe,
    wrap,
    wrap_low_memory_adamw,
    wrap_max_compression_adamw,
)

SHAPES = ((70, 70), (300,), ())
EACH = pytest.mark.parametrize(
    ("dtype", "device"), DEFAULTS, ids=lambda v: str(v).removeprefix("torch.")
)


def adamw(groups, policy=None, **options):
    return wrap(torch.optim.AdamW(groups, lr=1e-2), policy, chunk_size=1024, **options)


def configured(groups, first, second, **options):
    return adamw(groups, ConfigurablePolicy({"exp_avg": first, "exp_avg_sq": second}), **options)


def sgd(groups):
    policy = WarmupPolicy(1, "momentum_buffer")
    return wrap(torch.optim.SGD(groups, lr=1e-2, momentum=0.9, dampening=0.1), policy)


def adaptive(groups):
    optimizer = adamw(groups, AdaptiveWarmupPolicy(10, variance_codec="oneq(bits=8)"))
    optimizer.policy.activate_compression()
    return optimizer


def offloaded(groups, state, **options):
    return OffloadOptimizer(torch.optim.AdamW(groups, lr=1e-2), state, **options)


def on_the_host(groups, **options):
    return Pretends(groups, torch.optim.AdamW, lr=1e-2, minimal_size=100, **options)


def coded_on_the_host(groups):
    formats = {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8(signed=False)"}
    return Pretends(groups, partial(CodedOptimizer, rule=Adam(), formats=formats), minimal_size=100)


UPDATE_UNITS = ("int4(rounding=paired, units=update)", "minifloat(domain=sqrt)")
MAKES = {
    "auto": lambda groups: auto_wrap(torch.optim.AdamW(groups, lr=1e-2)),
    "warm": partial(adamw, policy=WarmupPolicy(1)),
    "adaptive": adaptive,
    "SGD": sgd,
    "exact": partial(adamw, policy=ConfigurablePolicy({})),
    "default codec": partial(adamw, policy=ConfigurablePolicy({}, "fp8")),
    "int8 and fp32": partial(configured, first=Int8MomentumCodec(), second=FP32Codec()),
    "fp16 and bf16": partial(configured, first=FP16Codec(), second=BF16Codec()),
    "4 bits": partial(configured, first=UPDATE_UNITS[0], second=UPDATE_UNITS[1], fused=True),
    "4 bits, decoded": partial(
        configured, first=UPDATE_UNITS[0], second=UPDATE_UNITS[1], fused=False
    ),
    "turbo": partial(configured, first="costate", second="oneq(bits=3)", store="host"),
    "published": partial(configured, first="dynamic4", second="linear4(normalization=rank1)"),
    "low memory fp16": partial(wrap_low_memory_adamw, lr=1e-2, warmup_steps=1),
    "low memory int8": partial(
        wrap_low_memory_adamw, lr=1e-2, warmup_steps=1, variance_mode="int8"
    ),
    "low memory fp32": partial(
        wrap_low_memory_adamw, lr=1e-2, warmup_steps=1, variance_mode="fp32"
    ),
    "low memory, small": partial(
        wrap_low_memory_adamw, lr=1e-2, warmup_steps=0, small_tensor_codec=BF16Codec()
    ),
    "low memory, away": partial(
        wrap_low_memory_adamw, lr=1e-2, warmup_steps=1, device_resident=False
    ),
    "max compression": partial(wrap_max_compression_adamw, lr=1e-2),
    "offload, exact": partial(offloaded, state=None),
    "offload, coded": partial(offloaded, state={"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)"}),
    "offload, here": partial(offloaded, state=WarmupPolicy(0), store="device"),
    "offload, policy": partial(offloaded, state=ConfigurablePolicy({"exp_avg": "bf16"})),
    "on the host": on_the_host,
    "gradients too": partial(on_the_host, offload_gradients=True),
    "coded on the host": coded_on_the_host,
}


def numbers(name, value):
    """All tensors, and counts as numbers."""
    return {
        key: part.double() if "step" in key.split() else part
        for key, part in tensors_in(name, value).items()
    }


def life(problem, make, dtype, device=None):
    """Steps, state dicts and what is made of these, under other defaults."""
    with torch_defaults(dtype, device):
        run = problem(make, shapes=SHAPES)
    if device is not None:
        run.run(1)
    with torch_defaults(dtype, device):
        run.run(3 if device is None else 2)
        saved = {"plain": run.optimizer.state_dict()}
        if hasattr(run.optimizer, "packed_state_dict"):
            saved["packed"] = run.optimizer.packed_state_dict()
        found = numbers("saved", saved)
        for name, state_dict in saved.items():
            other = problem(make, shapes=SHAPES)
            for ours, theirs in zip(other.params, run.params, strict=True):
                ours.data.copy_(theirs.data)
            other.step = run.step
            other.optimizer.load_state_dict(state_dict)
            found |= numbers(f"loaded {name}", other.run(1).tensors())
        return found | numbers("stepped", run.run(1).tensors())


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_defaults_change_nothing(problem, make) -> None:
    found = [life(problem, make, dtype, device) for dtype, device in DEFAULTS]
    expected = life(problem, make, torch.float32)
    for got, (dtype, device) in zip(found, DEFAULTS, strict=True):
        assert_same(f"default dtype {dtype}, device {device}", expected, got)


@pytest.mark.parametrize("preset", ["low memory int8", "max compression"])
@EACH
def test_moments_are_those_of_exact_adam(preset, dtype, device) -> None:
    """First moments, and roots of second ones, are within 5 % in the mean."""
    exact = Parameter(torch.zeros(64, 128, dtype=torch.float64))
    reference = torch.optim.AdamW([exact], lr=1e-2)
    param = Parameter(torch.zeros(64, 128))
    with torch_defaults(dtype):
        optimizer = MAKES[preset]([param])
    noise = torch.Generator().manual_seed(0)
    for step in range(200):
        param.grad = torch.randn(param.shape, generator=noise) + 0.3
        exact.grad = param.grad.double()
        reference.step()
        with torch_defaults(dtype, device if step else None):
            optimizer.step()
    state, theirs = optimizer.state[param], reference.state[exact]
    roots = state["exp_avg_sq"].double().sqrt(), theirs["exp_avg_sq"].sqrt()
    assert float(roots[0].mean() / roots[1].mean()) == pytest.approx(1, abs=0.05)
    means = state["exp_avg"].double().mean(), theirs["exp_avg"].mean()
    assert float(means[0] / means[1]) == pytest.approx(1, abs=0.05)
    assert float(state["step"]) == 200


class Asks(torch.optim.SGD):
    """Reads a number in its step, which a fake tensor does not have."""

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        if all(bool(grad.isfinite().all()) for grad in grads if grad is not None):
            super().step(closure)


def tried(cls=Asks):
    return probe.probe(cls([Parameter(torch.ones(3, device="cpu"))]))


MODES = {
    "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "fake tensors": FakeTensorMode,
}


@pytest.mark.parametrize("cls", [Asks, torch.optim.AdamW])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_optimizer_may_first_be_tried_in_a_mode(mode, cls, monkeypatch) -> None:
    monkeypatch.setattr(probe, "_found", {})
    expected = tried(cls)
    assert expected.chunked
    monkeypatch.setattr(probe, "_found", {})
    with mode():
        if mode is FakeTensorMode:
            with suppress(DataDependentOutputException):
                tried(cls)
        else:
            assert tried(cls) == expected
    assert tried(cls) == expected


class Defaulted(torch.optim.SGD):
    """Keeps a buffer in torch's default dtype, as an optimizer of somebody's may."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param].setdefault("own", torch.zeros(param.shape))


def test_what_was_found_holds_for_the_default_dtype_it_was_found_under() -> None:
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        with torch_defaults(dtype):
            found[dtype] = probe.probe(Defaulted([Parameter(torch.ones(3, dtype=torch.float32))]))
    assert found[torch.bfloat16].keys["own"] == torch.bfloat16
    assert found[torch.float32].keys["own"] is None
