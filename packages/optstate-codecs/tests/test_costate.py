"""CoState: its levels, its shares on normal numbers, pairs of steps, one bit."""

import pytest
import torch

from optstate_codecs import CoState, Int4
from optstate_codecs.rounding import Draw

LEVELS = {1: [0.5], 2: [0.5, 1.5], 3: range(4), 4: range(8), 6: range(32)}


def normal(numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0))


def encoded(format: CoState, x: torch.Tensor, step: int = 2) -> list[torch.Tensor]:
    parts = [torch.zeros(c.length(x.numel()), dtype=c.dtype) for c in format.components]
    format.encode(x, parts, Draw(0, step, 0, 2))
    return parts


def stored(format: CoState, x: torch.Tensor, step: int = 2) -> torch.Tensor:
    return format.decode(encoded(format, x, step))[: x.numel()].double()


def width(format: CoState, x: torch.Tensor) -> float:
    """The step of the one block."""
    (scale,) = encoded(format, x)[1].tolist()
    return scale


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_are_even_steps_of_both_signs(bits: int) -> None:
    format, x = CoState(bits, 8192), torch.linspace(-1, 1, 8192)
    draws = torch.stack([stored(format, x, step) for step in range(2, 22)])
    found = (draws / width(format, x)).unique().tolist()
    assert found == sorted({sign * level for level in LEVELS[bits] for sign in (-1, 1)})


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_largest_magnitude_is_the_highest_level(bits: int) -> None:
    x = normal(1000)
    largest = float(x.abs().max())
    top = width(CoState(bits, 1024), x) * max(LEVELS[bits])
    assert largest <= top * (1 + 1e-6) <= 1.008 * largest


def test_four_bits_are_int4() -> None:
    """So that kernels may take ``Int4``'s functions; with elements that are not finite, too."""
    x = normal(300)
    x[[5, 130]] = float("nan")
    for step in (2, 3):
        for ours, theirs in zip(
            encoded(CoState(4), x, step), encoded(Int4.first_moment(), x, step), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_amp_pct_is_the_share_below_the_amplitude_costate(bits: int, share: float) -> None:
    format, x = CoState(bits, 8192, share), normal(8192)
    step, levels = width(format, x), LEVELS[bits]
    # half way between the two levels at which the upper half of the levels begins
    threshold = (levels[len(levels) // 2 - 1] + levels[len(levels) // 2]) / 2
    assert float((x.abs() < threshold * step).double().mean()) == pytest.approx(share, abs=0.015)
    # what lies above the highest level is cut off
    above = x.abs() > max(levels) * step
    assert torch.equal(stored(format, x)[above], max(levels) * step * x.sign().double()[above])


def test_the_least_share_is_a_share() -> None:
    """However small its step: 1/4096 of the mean magnitude, and not what None stands for."""
    x = normal(8192)
    step = float(x.abs().mean()) / 4096
    assert width(CoState(6, 8192, 1e-6), x) == pytest.approx(step, rel=0.01)


def test_two_bits_have_a_share_of_their_own() -> None:
    x = normal(5000)
    for part, same in zip(encoded(CoState(2), x), encoded(CoState(2, amp_pct=0.8), x), strict=True):
        assert torch.equal(part, same)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("amp_pct", [None, 0.8])
def test_null_pct_is_the_share_that_is_zero_at_every_draw(bits: int, amp_pct) -> None:
    format, x = CoState(bits, 8192, amp_pct, 0.2), normal(8192)
    zero = torch.stack([stored(format, x, step) == 0 for step in range(2, 202)]).all(0)
    assert float(zero.double().mean()) == pytest.approx(0.2, abs=0.015)
    assert x[zero].abs().max() < 1.02 * x[~zero].abs().min()


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_mean_of_a_pair_is_within_half_a_step(bits: int) -> None:
    format, x = CoState(bits, 8192), normal(8192)
    step, inside = width(format, x), x.abs() <= max(LEVELS[bits]) * width(format, x)
    first, second, other = (stored(format, x, at)[inside] for at in (2, 3, 4))
    x = x.double()[inside]
    assert ((first + second) / 2 - x).abs().max() <= step / 2 * (1 + 1e-3)
    # of two steps that are no pair both may round up
    assert ((second + other) / 2 - x).abs().max() > 0.9 * step
    paired, apart = (first + second) / 2 - x, (second + other) / 2 - x
    assert paired.square().mean() < 0.6 * apart.square().mean()


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    """Each block's own, a shorter one at the end; nothing is drawn."""
    x, format = normal(300) * 3, CoState(1, 128)
    y = stored(format, x)
    assert not format.uses_random
    assert torch.equal(y.sign(), x.sign().double())
    for ours, block in zip(y.split(128), x.double().split(128), strict=True):
        assert len(ours.abs().unique()) == 1
        mean = float(block.abs().mean())
        assert mean * (1 - 1e-6) <= float(ours[0].abs()) <= 1.008 * mean


@pytest.mark.parametrize("bits", [1, 2])
def test_without_a_code_for_nan_neighbours_are_what_they_were(bits: int) -> None:
    """The second moment has the NaN; what is not finite counts as zero for the scale."""
    x, places = normal(300), torch.tensor([3, 130])
    others = torch.ones(300, dtype=torch.bool).index_fill(0, places, False)
    clean = stored(CoState(bits), x.index_fill(0, places, 0.0))
    for bad in (float("nan"), float("inf"), -float("inf")):
        y = stored(CoState(bits), x.index_fill(0, places, bad))
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits=5: must be one of 1, 2, 3, 4, 6"),
        ({"bits": 8}, "bits=8: must be one of"),
        ({"block_size": 100}, "block_size=100: must be a power of two"),
        ({"amp_pct": 0.0}, r"amp_pct=0\.0: must be None, or above 0 and below 1"),
        ({"amp_pct": 1.0}, r"amp_pct=1\.0: must be in \[0, 1\)"),
        ({"bits": 1, "amp_pct": 0.8}, r"amp_pct=0\.8: must be None with bits=1"),
        ({"null_pct": 1.0}, r"null_pct=1\.0: must be in \[0, 1\)"),
        ({"bits": 1, "null_pct": 0.1}, r"null_pct=0\.1: must be 0 with bits=1"),
        ({"bits": 2, "null_pct": 0.1}, r"null_pct=0\.1: must be 0 with bits=2"),
    ],
)
def test_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CoState(**options)
