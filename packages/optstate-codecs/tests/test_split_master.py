"""The mathematics of the split-master write, against float64 and torch's own roundings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optstate_codecs.rounding import Counter
from optstate_codecs.writes import parameter_write

HALVES = [torch.bfloat16, torch.float16]
SPLITS = ["split24", "split32"]
# the least finite magnitude that nearest rounding overflows, and one spacing of 24 bits
OVERFLOW = {torch.bfloat16: (2 - 2.0**-8) * 2.0**127, torch.float16: 65520.0}

halves = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
splits = pytest.mark.parametrize("name", SPLITS)


def split(x: torch.Tensor, name: str, dtype: torch.dtype, step: int = 1):
    """Write ``x`` and return the parameter, the correction and what both read back as."""
    write = parameter_write(name, dtype)
    parts = [torch.zeros(x.shape, dtype=c.dtype) for c in write.components]
    param = write.write(x, parts, Counter(0, step, 0).stream(0))
    assert param.dtype == dtype
    return param, parts[0], write.read(param, parts)


def every_kind(count: int = 1 << 18) -> torch.Tensor:
    """Floats of random bits, all float16 and bfloat16 ties, and the ends of every range."""
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (count,), generator=random, dtype=torch.int32)
    near = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    edges = [0x7F7F8000, 0x477FF000, 0x38800000, 0x33000000, 0x37000000, 0x7F800000, 0x00800000]
    around = torch.tensor([e + d for e in edges for d in (-256, -255, -32, -31, -1, 0, 1)])
    around = torch.cat([around, around - 2**31]).to(torch.int32)
    small = torch.randn(count, generator=random).mul(1e-5).view(torch.int32)
    return torch.cat([bits, near, near + 0x8000, near + 0x1000, around, small]).view(torch.float32)


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of ``dtype`` at ``x``, float64, without looking at bits."""
    info = torch.finfo(dtype)
    magnitude = np.maximum(np.abs(x.double().numpy()), info.smallest_normal)
    return torch.as_tensor(np.ldexp(info.eps, np.frexp(magnitude)[1] - 1))


@splits
@halves
def test_read_gives_back_what_was_written(name, dtype) -> None:
    x = every_kind()
    param, _, back = split(x, name, dtype)
    fits = x.abs() < OVERFLOW[dtype]
    assert torch.equal(torch.isnan(param), torch.isnan(x))
    assert torch.equal(torch.isnan(back), torch.isnan(x))
    beyond = ~fits & ~torch.isnan(x)
    assert torch.equal(back[beyond], x[beyond].sign() * float("inf"))
    assert torch.isfinite(param[fits]).all()
    assert torch.equal(torch.signbit(back[fits]), torch.signbit(x[fits]))

    x, back, param = x[fits], back[fits], param[fits]
    error = (back.double() - x.double()).abs()
    if name == "split24":
        top = x.abs() >= OVERFLOW[dtype] * (1 - 2.0**-14)
        assert (error < ulp(x, dtype) / 256)[~top].all()
        assert (error <= ulp(x, dtype) / 2).all()
    elif dtype == torch.bfloat16:
        assert torch.equal(back, x)
    else:
        large = x.abs() >= 2.0**-17
        assert torch.equal(back[large], x[large])
        assert (error <= 2.0**-41).all()
    # the parameter is the nearest to what both hold; where two are, the larger magnitude
    nearest = back.to(dtype)
    tie = (back.double() - nearest.double()).abs() == ulp(nearest, dtype) / 2
    assert torch.equal(param[~tie], nearest[~tie])
    assert (param.double().abs() >= nearest.double().abs())[tie].all()
    assert ((param.double() - back.double()).abs() <= ulp(back, dtype) / 2).all()


@halves
def test_ties_go_to_the_larger_magnitude(dtype) -> None:
    eps = torch.finfo(dtype).eps
    x = torch.tensor([1 + eps / 2, 1 + 3 * eps / 2])
    param, _, back = split(torch.cat([x, -x]), "split32", dtype)
    assert param.tolist() == [1 + eps, 1 + 2 * eps, -1 - eps, -1 - 2 * eps]
    assert x[0].to(dtype) == 1
    assert torch.equal(back, torch.cat([x, -x]))


@settings(max_examples=300, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 1000))
def test_any_finite_float_survives(x: float, step: int) -> None:
    value = torch.tensor([x])
    if abs(x) < OVERFLOW[torch.bfloat16]:
        assert torch.equal(
            split(value, "split32", torch.bfloat16)[2].view(torch.int32), value.view(torch.int32)
        )
    for dtype in HALVES:
        for name in SPLITS:
            _, correction, back = split(value, name, dtype, step)
            again = split(back, name, dtype, step + 1)
            assert torch.equal(again[2], back)
            assert torch.equal(again[1], correction)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0x7F80FFFF, -1, -0x7FFFFF])
def test_every_kind_of_nan_stays_nan(bits, name) -> None:
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for dtype in HALVES:
        param, correction, back = split(nan, name, dtype)
        assert torch.isnan(param).all()
        assert torch.isnan(back).all()
        assert int(correction) == 0


@splits
@halves
def test_infinite_only_where_nearest_is(name, dtype) -> None:
    largest = torch.finfo(dtype).max
    edge = torch.tensor(OVERFLOW[dtype])
    below = torch.nextafter(edge, torch.zeros(()))
    x = torch.stack([torch.tensor(largest), below, edge, torch.tensor(float("inf"))])
    for step in range(50):
        for sign in (1, -1):
            param, correction, _ = split(sign * x, name, dtype, step)
            assert param.tolist() == [sign * v for v in (largest, largest, *[float("inf")] * 2)]
            assert correction[2:].tolist() == [0, 0]


@splits
@halves
def test_a_parameter_that_was_set_is_read_within_half_a_spacing(name, dtype) -> None:
    """Whatever the correction still says: pruning, clamping, loading weights."""
    write = parameter_write(name, dtype)
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    info = torch.iinfo(write.components[0].dtype)
    for stale in (info.min, -1, 1, info.max):
        correction = torch.full(values.shape, stale, dtype=write.components[0].dtype)
        back = write.read(values, [correction])
        finite = torch.isfinite(values)
        exact = values.float()
        assert torch.equal(torch.isnan(back), torch.isnan(values))
        assert torch.equal(back[torch.isinf(values)], exact[torch.isinf(values)])
        assert torch.isfinite(back[finite]).all()
        assert torch.equal(torch.signbit(back[finite]), torch.signbit(values[finite]))
        error = (back.double() - exact.double()).abs()[finite]
        assert (error <= ulp(exact[finite], dtype) / 2).all()


@halves
def test_24_bits_are_unbiased(dtype) -> None:
    spread = torch.tensor([1.0, 0.03, 1e-4, 2e-5, 1e-6])
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * spread[:, None]
    many, steps = x.flatten().repeat(500), 200
    total = torch.zeros(x.numel(), dtype=torch.float64)
    for step in range(steps):
        back = split(many, "split24", dtype, step)[2].double()
        total += (back - many.double()).view(500, -1).sum(0)
    unit = ulp(x.flatten(), dtype) / 256
    # a coin of unit height has a deviation of at most 1/2: 5 deviations of the mean
    assert ((total / (500 * steps)).abs() / unit).max() < 5 * 0.5 / (500 * steps) ** 0.5
