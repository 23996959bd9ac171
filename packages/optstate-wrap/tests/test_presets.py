"""What the presets store, how long their steps are, and how they learn."""

import math

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs.memory import state_bytes
from optstate_codecs.testing import loss_apart
from optstate_wrap import (
    AdaptiveWarmupPolicy,
    ConfigurablePolicy,
    FP16Codec,
    Int8MomentumCodec,
    WarmupPolicy,
    auto_wrap,
    make_low_memory_policy,
    wrap,
    wrap_low_memory_adamw,
    wrap_max_compression_adamw,
)

SHAPES = ((512, 512), (64, 1024), (512,))
INT8 = Int8MomentumCodec()


def adamw(policy):
    return lambda params: wrap(torch.optim.AdamW(params, lr=1e-3), policy)


#: how much less state than plain, in percent: by how the optimizer is made
SAVED = {
    "int8 m": (adamw(WarmupPolicy(0)), torch.optim.AdamW, 37),
    "fp16 m": (adamw(ConfigurablePolicy({"exp_avg": FP16Codec()})), torch.optim.AdamW, 24.8),
    "SGD int8": (
        lambda p: wrap(
            torch.optim.SGD(p, lr=0.1, momentum=0.9), ConfigurablePolicy({"momentum_buffer": INT8})
        ),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        74,
    ),
    "int8 both": (adamw(make_low_memory_policy(0, "int8")), torch.optim.AdamW, 74),
    "low memory": (lambda p: wrap_low_memory_adamw(p, warmup_steps=0), torch.optim.AdamW, 62),
    "4 bits both": (wrap_max_compression_adamw, torch.optim.AdamW, 86),
}


def params_of(shapes=SHAPES):
    params = [Parameter(torch.zeros(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    return params


@pytest.mark.parametrize(("make", "plain", "percent"), SAVED.values(), ids=SAVED)
def test_state_is_smaller_by_what_is_said(make, plain, percent) -> None:
    sizes = []
    for cls in (make, plain):
        optimizer = cls(params_of())
        optimizer.step()
        sizes.append(
            optimizer.memory_report().state_bytes
            if hasattr(optimizer, "memory_report")
            else state_bytes(optimizer)
        )
    assert 100 * (1 - sizes[0] / sizes[1]) >= percent


PRESETS = {
    "default": lambda p, **o: auto_wrap(torch.optim.AdamW(p, **o)),
    "default, warm": lambda p, **o: wrap(torch.optim.AdamW(p, **o), WarmupPolicy(10)),
    "low memory": wrap_low_memory_adamw,
    "low memory int8": lambda p, **o: wrap_low_memory_adamw(p, variance_mode="int8", **o),
    "max compression": wrap_max_compression_adamw,
}


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_no_step_is_longer_than_8_lr(make, sparse) -> None:
    """Gradients whose second moments are spread log-normally, sigma 2, within every block."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(torch.randn(1 << 15, generator=generator))
    param = Parameter(torch.zeros(1 << 15))
    optimizer = make([param], lr=1.0, weight_decay=0.0)
    for _ in range(150):
        param.grad = torch.randn(param.shape, generator=generator) * size
        if sparse:
            param.grad *= torch.rand(param.shape, generator=generator) < 0.05
        before = param.detach().clone()
        optimizer.step()
        assert float((param.detach() - before).abs().max()) <= 8


@pytest.mark.parametrize("name", PRESETS)
def test_learns_as_adamw_does(name) -> None:
    limit = 0.01 if name != "max compression" else 0.03
    assert abs(loss_apart(PRESETS[name], torch.optim.AdamW, lr=2e-3)) < limit


def test_second_moments_are_not_rounded_to_zero() -> None:
    for bad in ("int8", "fp16", "int4"):
        with pytest.raises(ValueError, match="rounds small second moments to zero"):
            ConfigurablePolicy({"exp_avg_sq": bad})
        with pytest.raises(ValueError, match="rounds small second moments to zero"):
            WarmupPolicy(variance_codec=bad)
    with pytest.raises(ValueError, match="holds no negative numbers"):
        ConfigurablePolicy({"exp_avg": "oneq"})
    chosen = ConfigurablePolicy({}, "int8").get_codecs(
        Parameter(torch.ones(3)), {"exp_avg": 0, "exp_avg_sq": 0}, 0
    )
    assert chosen["exp_avg"].stored.name == "int8"
    assert chosen["exp_avg_sq"].stored is None


def test_plateau_begins_compression() -> None:
    policy = AdaptiveWarmupPolicy(1000, patience=3, tol=0.1)
    losses = [3.0, 2.0, 1.95, 1.0, 0.95, 0.93, 0.91, 5.0]
    assert [policy.update_on_loss(x) for x in losses] == [False] * 6 + [True] * 2
    assert policy.compressing(0)
    other = AdaptiveWarmupPolicy(1000)
    assert not other.compressing(999)
    assert other.compressing(1000)
    other.activate_compression()
    assert other.compressing(0)


def test_fp16_codec_keeps_11_bits_of_any_size() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for exponent in (-100, -30, 0, 60):
        scaled = x * 2.0**exponent
        back = FP16Codec().decode(FP16Codec().encode(scaled))
        assert float(((back - scaled) / scaled.abs().max()).abs().max()) <= 2**-11
        assert math.isclose(float(back.double().norm() / scaled.double().norm()), 1, rel_tol=1e-4)
    odd = torch.tensor([float("nan"), 1.0, float("inf"), 0.0])
    back = FP16Codec().decode(FP16Codec().encode(odd))
    assert torch.equal(back[1:], odd[1:])
    assert back[0].isnan()
    assert FP16Codec().nbytes(2048) == 4100
