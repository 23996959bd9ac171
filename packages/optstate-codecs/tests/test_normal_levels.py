"""CoState's levels for a normal distribution: Lloyd's constants, the scale's fit, zeros."""

import math
from itertools import pairwise
from statistics import NormalDist

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from optstate_codecs import CoState, parse_format
from optstate_codecs.formats.normal_levels import LEVELS

BITS = tuple(LEVELS)
DENSITY = NormalDist()
finite = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def form(bits: int, block_size: int = 16) -> CoState:
    return CoState(bits, block_size, levels="normal")


def stored(format: CoState, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    parts = [torch.zeros(c.length(x.numel()), dtype=c.dtype) for c in format.components]
    format.encode(x, parts)
    return format.decode(parts)[: x.numel()].double(), parts


def lloyd(count: int) -> list[float]:
    """The levels of magnitudes, from the density alone: means of their cells, until they stay."""
    levels = [(i + 0.5) * 3 / count for i in range(count)]
    for _ in range(3000):
        edges = [0.0, *((a + b) / 2 for a, b in pairwise(levels))]
        above = [*edges[1:], math.inf]
        levels = [
            (DENSITY.pdf(a) - (0 if b == math.inf else DENSITY.pdf(b)))
            / ((1 if b == math.inf else DENSITY.cdf(b)) - DENSITY.cdf(a))
            for a, b in zip(edges, above, strict=True)
        ]
    return levels


@pytest.mark.parametrize("bits", BITS)
def test_the_levels_are_lloyds(bits: int) -> None:
    assert LEVELS[bits] == pytest.approx(lloyd(2 ** (bits - 1)), abs=3e-7)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("numel", [64, 100, 3])
def test_codes_and_scale_against_their_definition(bits: int, numel: int) -> None:
    """In float64, block by block: nearest to the levels times sigma, then least squares."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    y, parts = stored(form(bits, 32), x)
    levels = torch.tensor(LEVELS[bits], dtype=torch.float64)
    pairs = zip(x.double().split(32), y.split(32), parts[1].double(), strict=True)
    for block, got, scale in pairs:
        sigma = block.abs().mean() * math.sqrt(math.pi / 2)
        nearest = levels[(block.abs()[:, None] - sigma * levels).abs().argmin(1)]
        fit = (block.abs() * nearest).sum() / nearest.square().sum()
        assert fit * (1 - 2**-7) <= scale <= fit * (1 + 1e-6)
        torch.testing.assert_close(got, scale * nearest * block.sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
@given(values=st.lists(finite, min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_norm_of_no_block_grows(bits: int, values: list[float]) -> None:
    x = torch.tensor(values)
    y, _ = stored(form(bits), x)
    for before, after in zip(x.double().split(16), y.split(16), strict=True):
        assert after.norm() <= before.norm() * (1 + 1e-6)


@pytest.mark.parametrize("bits", BITS)
@given(values=st.lists(finite, min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_signs(bits: int, values: list[float]) -> None:
    x = torch.tensor(values)
    y, _ = stored(form(bits), x)
    assert torch.equal(stored(form(bits), -x)[0], -y)
    assert (y * x >= 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("exponent", [-60, -40, 0, 40, 60])
def test_codes_do_not_depend_on_powers_of_two(bits: int, exponent: int) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(2))
    codes, scale = stored(form(bits), x)[1]
    other, larger = stored(form(bits), x * 2.0**exponent)[1]
    assert torch.equal(codes, other)
    assert torch.equal(scale.float() * 2.0**exponent, larger.float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [1e-33, 3e38])
def test_sums_out_of_range(bits: int, value: float) -> None:
    """A block so small becomes zeros; one so large stays finite, and no larger than it was."""
    y, (_, scale) = stored(form(bits), torch.full((16,), value))
    assert torch.isfinite(scale).all()
    assert (y.abs() <= (0 if value < 1 else value)).all()


@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_counts_as_zero(bits: int) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(3))
    expected = stored(form(bits), x.index_fill(0, torch.tensor([5]), 0.0))[1]
    for bad in (float("nan"), float("inf"), -float("inf")):
        got = stored(form(bits), x.index_fill(0, torch.tensor([5]), bad))[1]
        assert all(map(torch.equal, got, expected))


def test_text() -> None:
    format = CoState(2, 64, levels="normal")
    assert format.spec == "costate(bits=2, block_size=64, levels=normal)"
    assert parse_format(format.spec) == format
    # the text of formats with even levels stays what it was
    assert CoState(2, 64).spec == "costate(bits=2, block_size=64)"
    assert not format.uses_random
    assert 8 * format.nbytes(6400) == 2.25 * 6400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": "even "}, "levels='even ': must be one of 'even', 'normal'"),
        ({"bits": 6}, "levels='normal': must be 'even' with bits=6"),
        ({"bits": 3, "amp_pct": 0.8}, "amp_pct=0.8: must be None with levels='normal'"),
        ({"bits": 3, "null_pct": 0.1}, "null_pct=0.1: must be 0.0 with levels='normal'"),
    ],
)
def test_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CoState(**{"levels": "normal", **options})
