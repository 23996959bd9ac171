"""Minifloat and FP8 codes against their formulas in float64, and torch's own float8."""

import pytest
import torch

from optstate_codecs import FP8, Format, Int4, Minifloat
from optstate_codecs.formats.fp8 import value_table
from optstate_codecs.rounding import Draw

GRIDS = [(2, 2, False), (3, 1, False), (1, 3, False), (1, 2, True), (4, 4, False)]


def encoded(format: Format, x: torch.Tensor, step: int = 2) -> list[torch.Tensor]:
    parts = [torch.zeros(c.length(x.numel()), dtype=c.dtype) for c in format.components]
    format.encode(x, parts, Draw(0, step, 0, 2))
    return parts


def points(exponent_bits: int, mantissa_bits: int, signed: bool) -> torch.Tensor:
    """The non-negative points under a scale of 1, one float at a time."""
    bits = exponent_bits + mantissa_bits
    count = 2**bits if signed else 2**bits - 1
    grid = [
        (1 + n % 2**mantissa_bits / 2**mantissa_bits) * 2.0 ** (n // 2**mantissa_bits) - 1
        for n in range(count)
    ]
    return torch.tensor(grid, dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nearest_is_the_nearest_point(grid) -> None:
    exponent_bits, mantissa_bits, signed = grid
    format = Minifloat(exponent_bits, mantissa_bits, 512, signed=signed)
    expected = points(*grid)
    x = torch.rand(512, generator=torch.Generator().manual_seed(0)).pow(3)
    parts = encoded(format, x)
    y = format.decode(parts).double() / parts[1].double()
    x = x.double() / parts[1].double()
    assert set(y.tolist()) <= set(expected.tolist())
    nearest = (x[:, None] - expected).abs().amin(1)
    above = x >= expected[1]
    # x + 1 is rounded to float32 first
    assert ((y - x).abs() <= nearest + 1e-7 * (x + 1))[above].all()
    if not signed:
        assert (y > 0).all()
        assert (y[~above] == expected[1]).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_reach_just_far_enough(grid) -> None:
    exponent_bits, mantissa_bits, signed = grid
    top = float(points(*grid)[-1])
    format = Minifloat(exponent_bits, mantissa_bits, 16, signed=signed)
    for largest in (1.0, 1.01, 1.3, 1.76, 1.9375, 1.99, 3e-20, 1e30):
        scale = float(encoded(format, torch.tensor([largest, largest / 3]))[1])
        largest = float(torch.tensor(largest))
        if signed:
            assert largest <= top * scale * (1 + 1e-6) <= 1.008 * largest
        else:
            assert largest <= top * scale < 2 * largest
            assert scale == 2 ** round(torch.tensor(scale).log2().item())


def test_lift_raises_the_probability_of_rounding_up() -> None:
    x = torch.tensor([11.0, 4.25, 4.5, 4.75, 9.5])
    for lift in (0.0, 1 / 16):
        format = Minifloat(2, 2, 16, rounding="stochastic", lift=lift)
        draws = [format.decode(encoded(format, x, step))[:5] for step in range(8000)]
        part = torch.tensor([0, 0.25, 0.5, 0.75, 0.25], dtype=torch.float64)
        expected = part + lift * part * (1 - part)
        base, step = torch.tensor([11.0, 4, 4, 4, 9]), torch.tensor([1.0, 1, 1, 1, 2])
        got = ((torch.stack(draws).double() - base) / step).mean(0)
        assert (
            (got - expected).abs() <= 4 * (expected * (1 - expected) / 8000).sqrt() + 1e-4
        ).all()


def test_paired_draws_mirror_the_step_before() -> None:
    for step in (2, 4, 100):
        even, odd = Draw(7, step, 3, 2, 5), Draw(7, step + 1, 3, 2, 5)
        assert torch.equal(even.paired16(50), even.bits16(50))
        assert torch.equal(even.paired16(50) + odd.paired16(50), torch.full((50,), 65535).int())


@pytest.mark.parametrize("format", [Int4.first_moment(16), FP8.first_moment(16)], ids=str)
def test_errors_of_a_pair_cancel(format: Format) -> None:
    """Of two steps, one rounds up by as much as the other rounds down, whatever the sign."""
    x = torch.randn(16000, generator=torch.Generator().manual_seed(0))
    apart = [(format.decode(encoded(format, x, step)) - x).double() for step in (2, 3, 4)]
    independent = (apart[1] + apart[2]).square().mean()
    assert (apart[0] + apart[1]).square().mean() < 0.6 * independent


def test_fp8_is_float8_e4m3fn() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).to(torch.float32)
    got = value_table(torch.device("cpu"))
    assert torch.equal(got.nan_to_num(nan=999.0), expected.nan_to_num(nan=999.0))
    assert torch.equal(got.signbit(), expected.signbit())

    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2**16, generator=noise) * torch.exp(3 * torch.randn(2**16, generator=noise))
    parts = encoded(FP8(16), x)
    cast = (x / parts[1].repeat_interleave(16)).to(torch.float8_e4m3fn)
    assert torch.equal(parts[0], cast.view(torch.uint8))


def test_fp8_scale_brings_the_block_to_448() -> None:
    for largest, scale in ((448.0, 1.0), (449.0, 2.0), (1.75, 2.0**-8), (1.76, 2.0**-7)):
        assert float(encoded(FP8(16), torch.tensor([largest]))[1]) == scale


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exponent_bits": 3}, "exponent_bits=3, mantissa_bits=2: must be"),
        ({"exponent_bits": 4, "mantissa_bits": 0}, "at least 1"),
        ({"exponent_bits": 6}, "1 to 5"),
        ({"lift": 0.5}, "lift=0.5: must be one of"),
        ({"units": "update"}, "units='update': needs signed=True"),
        ({"signed": True, "mantissa_bits": 1, "domain": "sqrt"}, "domain='sqrt': needs"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Minifloat(**options)
