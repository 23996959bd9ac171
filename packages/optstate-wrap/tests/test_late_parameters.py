"""A parameter whose first gradient comes after the state was saved goes on as if it never was."""

import copy

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs import GradientRelease
from optstate_wrap import (
    AdaptiveWarmupPolicy,
    ConfigurablePolicy,
    OffloadOptimizer,
    WarmupPolicy,
    wrap,
    wrap_low_memory_adamw,
    wrap_max_compression_adamw,
)

SHAPES = ((40, 33), (64, 70), (300,))
LATE = 1
CODED = {"exp_avg": "int8(rounding=stochastic, units=update)", "exp_avg_sq": "oneq(bits=8)"}


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def sgd(params):
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


MOMENTUM = {"momentum_buffer": "int8(rounding=stochastic)"}
MAKE = {
    "warm-up before": lambda p: wrap(adamw(p), WarmupPolicy(2, min_int8_elements=100)),
    "warm-up after": lambda p: wrap(adamw(p), ConfigurablePolicy(CODED, warmup_steps=5), 1024),
    "warm-up by loss": lambda p: wrap(adamw(p), AdaptiveWarmupPolicy(4, min_int8_elements=100)),
    "through the inner optimizer": lambda p: wrap(
        adamw(p), ConfigurablePolicy(CODED), 1024, fused=False
    ),
    "by the codecs' engine": lambda p: wrap(adamw(p), ConfigurablePolicy(CODED), 1024),
    "SGD": lambda p: wrap(sgd(p), ConfigurablePolicy(MOMENTUM, warmup_steps=1), 1024),
    "on the host": lambda p: OffloadOptimizer(adamw(p), CODED, chunk_size=1024),
    "low memory": lambda p: wrap_low_memory_adamw(p, 1e-2, warmup_steps=2, variance_mode="int8"),
    "max compression": lambda p: wrap_max_compression_adamw(p, 1e-2),
}


class Run:
    """Some parameters, one of which is frozen until ``thaw``."""

    def __init__(self, make, like=None, dtype=torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        starts = like or [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.params = [Parameter(start.detach().clone().to(dtype)) for start in starts]
        self.params[LATE].requires_grad_(False)
        self.optimizer = make(self.params)
        self.count = 0

    def thaw(self) -> None:
        self.params[LATE].requires_grad_(True)

    def step(self, count: int) -> None:
        for _ in range(count):
            generator = torch.Generator().manual_seed(100 + self.count)
            grads = [torch.randn(p.shape, generator=generator).to(p) for p in self.params]
            pairs = zip(self.params, grads, strict=True)
            sum((p * grad).sum() for p, grad in pairs if p.requires_grad).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.count += 1


def resumed(make, kind: str, released: bool = False, dtype=torch.float32):
    """Parameters that never stopped, and those of a run that was saved and loaded."""
    whole = Run(make, dtype=dtype)
    whole.step(3)
    saved = copy.deepcopy(getattr(whole.optimizer, kind)())
    assert LATE not in saved["state"]
    other = Run(make, whole.params, dtype)
    other.count = whole.count
    other.optimizer.load_state_dict(saved)
    for run in (whole, other):
        run.thaw()
        release = GradientRelease(run.optimizer).attach() if released else None
        run.step(4)
        if release is not None:
            release.detach()
    return whole, other


@pytest.mark.parametrize("released", [False, True], ids=["stepped", "released"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_packed_state_resumes_bit_for_bit(make, dtype, released) -> None:
    whole, other = resumed(make, "packed_state_dict", released, dtype)
    for a, b in zip(whole.params, other.params, strict=True):
        assert torch.equal(a, b)
        mine, theirs = whole.optimizer.state[a], other.optimizer.state[b]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_decoded_state_resumes_a_late_parameter_bit_for_bit(make) -> None:
    """It has no codes that could be encoded anew, and its warm-up and random numbers are saved."""
    whole, other = resumed(make, "state_dict")
    assert torch.equal(whole.params[LATE], other.params[LATE])
    for a, b in zip(whole.params, other.params, strict=True):
        step = whole.optimizer.state[a].get("step")
        assert step == other.optimizer.state[b].get("step")


NEAREST = {"exp_avg": "int8", "exp_avg_sq": "bf16(rounding=nearest)"}
STOCHASTIC = {"exp_avg": "int8(rounding=stochastic)", "exp_avg_sq": "bf16"}
#: int8 has 127 codes up to the largest of a block; bfloat16 has 2^8 between powers of two
CODE = {"exp_avg": 1 / 127, "exp_avg_sq": 2.0**-7}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("codecs", [NEAREST, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_decoded_state_is_rounded_by(dtype, codecs, fused) -> None:
    """By no more than a code, and by a last place where codes are exact in the dtype."""

    def make(params):
        return wrap(adamw(params), ConfigurablePolicy(codecs), fused=fused)

    run = Run(make, dtype=dtype)
    run.step(5)
    other = Run(make, run.params, dtype)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    packed = Run(make, run.params, dtype)
    packed.optimizer.load_state_dict(run.optimizer.packed_state_dict())
    for a, b, c in zip(run.params, other.params, packed.params, strict=True):
        if a is run.params[LATE]:
            continue
        for key, code in CODE.items():
            before = run.optimizer.state[a][key]
            assert torch.equal(packed.optimizer.state[c][key], before)
            before, after = before.double(), other.optimizer.state[b][key].double()
            whole = before.abs().max() if key == "exp_avg" else before.abs()
            # bfloat16 rounds what is decoded, before and after
            least = code + 2.0**-8 if dtype is torch.bfloat16 else 2.0**-22
            assert ((after - before).abs() <= least * whole).all()
