"""1Q against its levels in float64: zero, means, moving scales, marked blocks, a carried moment."""

import pytest
import torch

from optstate_codecs import OneQ, parse_format
from optstate_codecs.rounding import Draw

# mantissa bits of a level, and how much of f (1 - f) is added to a share f
GRIDS = {2: (0, -11 / 16), 3: (0, 3 / 16), 4: (1, 1 / 8), 6: (3, 1 / 32), 8: (5, 1 / 128)}
ALL = pytest.mark.parametrize("bits", GRIDS)


def levels(bits: int) -> torch.Tensor:
    """The positive levels under a scale of 1, float64."""
    per = 2 ** GRIDS[bits][0]
    roots = [2.0 ** (i // per) * (1 + i % per / per) for i in range(2**bits - 1)]
    return torch.tensor(roots, dtype=torch.float64)


def encoded(format: OneQ, v: torch.Tensor, step: int = 0) -> list[torch.Tensor]:
    parts = [torch.zeros(c.length(v.numel()), dtype=c.dtype) for c in format.components]
    format.encode(v.float(), parts, Draw(0, step, 0, 3))
    return parts


def stored(format: OneQ, v: torch.Tensor, step: int = 0) -> torch.Tensor:
    return format.decode(encoded(format, v, step))[: v.numel()].double()


@ALL
def test_levels_are_kept_with_no_rounding(bits: int) -> None:
    grid = levels(bits)
    assert float(grid[-1] / grid[0]) == {2: 4, 3: 64, 4: 128, 6: 224, 8: 248}[bits]
    v = torch.cat([grid.flip(0), grid.new_zeros(3)]).square()
    for power in (0, -60, 40):
        for step in range(20):
            assert torch.equal(stored(OneQ(bits, 512), v * 2.0**power, step), v * 2.0**power)


@ALL
def test_zero_is_kept_and_is_for_zero(bits: int) -> None:
    noise = torch.Generator().manual_seed(0)
    v = 10 ** (20 * torch.randn(4096, generator=noise).clamp(-1.8, 1.8))
    v[torch.rand(4096, generator=noise) < 0.3] = 0
    for step in range(10):
        assert torch.equal(stored(OneQ(bits), v, step) > 0, v > 0)


@ALL
def test_the_mean_of_the_root_is_the_root_and_the_lift(bits: int) -> None:
    """Inside the grid; the scale is 1, by a first element at the highest level."""
    grid, lift, count, steps = levels(bits), GRIDS[bits][1], 256, 30
    share = torch.rand(31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    roots = torch.cat([grid[-1:], (grid[-1] / grid[0]) ** share])
    above = torch.searchsorted(grid, roots).clamp(min=1)
    below, width = grid[above - 1], grid[above] - grid[above - 1]
    part = (roots - below) / width
    chance = part + lift * part * (1 - part)
    v = roots.square().repeat(count)
    draws = torch.stack(
        [stored(OneQ(bits, 8192), v, t).sqrt().view(count, 32) for t in range(steps)]
    )
    got = (draws.mean((0, 1)) - below) / width
    # five deviations of so many draws; a share is cut off after 16 bits
    deviation = (chance * (1 - chance) / (count * steps)).sqrt()
    assert ((got - chance).abs() <= 5 * deviation + 1e-3).all()
    # so that the mean is the root, and a small share of a step
    assert ((got - part).abs() <= abs(lift) / 4 + 5 * deviation + 1e-3).all()


@ALL
def test_below_the_lowest_level_is_the_lowest(bits: int) -> None:
    grid = levels(bits)
    v = torch.cat([grid[-1:], torch.tensor([0.999, 0.5, 1e-3, 1e-12])]).square()
    for step in range(50):
        y = stored(OneQ(bits, 16), v, step).sqrt()
        assert (y[2:] == 1).all()
        assert (y[1] == 1) | (y[1] == grid[1])


@ALL
def test_a_scale_moves_by_octaves_and_rounds_nothing_anew(bits: int) -> None:
    format, grid, per = OneQ(bits, 512), levels(bits), 2 ** GRIDS[bits][0]
    parts = encoded(format, torch.cat([grid, grid[-1:]]).square())
    # a last element takes the scale two octaves up, and back down by one
    high, low = grid[-1] * 4, grid[-1] * 2
    up = encoded(format, torch.cat([grid, high.view(1)]).square(), 1)
    assert [float(p[1]) for p in (parts, up)] == [1, 4]
    y = format.decode(up)[: len(grid)].double()
    assert torch.equal(y, grid.clamp(min=4).square())
    down = encoded(format, torch.cat([y, low.view(1) ** 2]), 2)
    assert float(down[1]) == 2
    assert torch.equal(format.decode(down)[: len(grid)].double(), y)
    unpacked = [format.decode(p).sqrt().double()[: len(grid)] for p in (up, down)]
    codes = [torch.searchsorted(grid, r / s) for r, s in zip(unpacked, (4, 2), strict=True)]
    assert ((codes[1] - codes[0]) == per).all()


@ALL
def test_scales_reach_just_far_enough(bits: int) -> None:
    top = float(levels(bits)[-1])
    for largest in (1.0, 1.01, 1.49, 1.51, 1.76, 1.9375, 1.99, 3e-18, 1e18):
        v = torch.tensor([largest, largest / 3]).square()
        scale = float(encoded(OneQ(bits, 16), v)[1])
        assert scale == 2 ** round(torch.tensor(scale).log2().item())
        assert largest * (1 - 1e-6) <= top * scale < 2 * largest * (1 + 1e-6)


@ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_marked_block_raises_its_lowest_octave_and_nothing_else(bits: int, bad: float) -> None:
    format, noise = OneQ(bits, 64), torch.Generator().manual_seed(0)
    v = torch.randn(320, generator=noise).square() * torch.randn(320, generator=noise).exp()
    v[7], v[192:256] = 0, 0
    places = torch.tensor([0, 70, 71, 200])
    clean = stored(format, v.index_fill(0, places, 0.0))
    spoilt = v.index_fill(0, places, bad)
    parts = encoded(format, spoilt)
    y = format.decode(parts)[:320].double()
    assert torch.isnan(y).nonzero().view(-1).tolist() == places.tolist()
    assert (parts[1] < 0).tolist() == [True, True, False, True, False]
    finite = torch.isfinite(spoilt)
    scale = parts[1].double().repeat_interleave(64)
    lowest = scale.clamp(max=0).square() * (clean > 0)
    assert torch.equal(y[finite], torch.maximum(clean, lowest)[finite])
    # once it is whole again, nothing is marked
    again = encoded(format, torch.nan_to_num(y.float(), nan=0.0), 1)
    assert (again[1] >= 0).all()


BOUNDS = [(2, 0.1, 0.1), (3, 0.03, 0.1), (4, 0.03, 0.07), (6, 0.01, 0.02), (8, 0.01, 0.01)]


@pytest.mark.parametrize(("bits", "length", "root"), BOUNDS)
def test_a_carried_moment_does_not_drift(bits: int, length: float, root: float) -> None:
    """Decoded, updated and stored 3,000 times beside a recursion in float64.

    What the lift is for is the mean length of a step, 1 / root. That takes roots which are larger
    in the mean of their logarithms, by about half the square of those's spread.
    """
    format, numel, beta = OneQ(bits), 2048, 0.999
    parts = [torch.zeros(c.length(numel), dtype=c.dtype) for c in format.components]
    exact, noise = torch.zeros(numel, dtype=torch.float64), torch.Generator().manual_seed(0)
    for step in range(3000):
        squared = torch.randn(numel, generator=noise).square()
        exact = beta * exact + (1 - beta) * squared
        v = beta * format.decode(parts) + (1 - beta) * squared
        format.encode(v, parts, Draw(0, step, 0, 3))
    logs = (format.decode(parts).double() / exact).log() / 2
    assert float((-logs).exp().mean()) == pytest.approx(1, abs=length)
    assert abs(float(logs.mean())) <= root


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("oneq(bits=1)", "bits=1: must be one of 2, 3, 4, 6, 8"),
        ("oneq(bits=5)", "bits=5: must be one of 2, 3, 4, 6, 8"),
        ("oneq(block_size=8)", "block_size=8: must be a power of two from 16 to 8192"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_format(text)
