"""Counter-based randomness against numpy, and stochastic rounding to bfloat16."""

import numpy as np
import pytest
import torch

from optstate_codecs.rounding import (
    Counter,
    Draw,
    hash_words,
    step_key,
    stochastic_round_bf16,
    stream_key,
)


def oracle(key: tuple[int, int], odd: bool, index: np.ndarray) -> np.ndarray:
    """The documented hash in 64-bit numpy arithmetic."""
    mask = np.uint64(0xFFFFFFFF)
    x = ((index & mask) + np.uint64(key[0])) & mask
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & mask
    x = x ^ (x >> np.uint64(15))
    high = (np.uint64(key[1]) + (index >> np.uint64(32)) * np.uint64(0x9E3779B9)) & mask
    last = 0x846CA68B * (747796405 if odd else 1) & 0xFFFFFFFF
    x = (((x + high) & mask) * np.uint64(last)) & mask
    return x ^ (x >> np.uint64(16))


@pytest.mark.parametrize("start", [0, 65536, 2**31 - 5, 2**32 - 7, 2**32, 5 * 2**32 + 1, 2**40])
def test_hash_is_the_documented_one(start: int) -> None:
    assert step_key(stream_key(123, 7, 1), 99) == step_key(stream_key(123, 7, 1), 98)
    key = step_key(stream_key(123, 7, 1), 99)
    index = np.arange(start, start + 100, dtype=np.uint64)
    for odd in (False, True):
        got = hash_words(key, odd, start, 100).numpy().astype(np.int64) & 0xFFFFFFFF
        np.testing.assert_array_equal(got.astype(np.uint64), oracle(key, odd, index))


@pytest.mark.parametrize("start", [0, 1, 2**33 - 3, 2**40])
@pytest.mark.parametrize("stream", [4, 5])
def test_neighbours_share_a_word_and_swap_its_halves(start: int, stream: int) -> None:
    index = np.arange(start // 2, start // 2 + 51, dtype=np.uint64)
    words = oracle(step_key(stream_key(123, 7, 2), 99), True, index)
    got = Draw(123, 99, 7, stream, start).bits16(100).tolist()
    for place, bits in enumerate(got):
        element = start + place
        word = int(words[element // 2 - start // 2])
        assert bits == (word & 0xFFFF if element % 2 == stream % 2 else word >> 16)


def test_draws_do_not_depend_on_how_they_are_cut() -> None:
    whole = Draw(1, 2, 3, 4).dither(1000)
    odd = [(0, 333), (333, 334), (667, 333)]
    assert torch.equal(whole, torch.cat([Draw(1, 2, 3, 4).at(s).dither(n) for s, n in odd]))
    parts = torch.cat([Draw(1, 2, 3, 4).at(s).dither(250) for s in range(0, 1000, 250)])
    assert torch.equal(whole, parts)
    assert torch.equal(Counter(1, 2, 3, offset=250).stream(4).dither(250), whole[250:500])


def test_known_values() -> None:
    """A change of the generator would break every resumed run: these numbers are for ever."""
    assert Draw(0, 1, 0, 2).bits16(5).tolist() == [37427, 33598, 37899, 447, 54678]
    assert Draw(0, 1, 0, 3).bits16(5).tolist() == [33598, 37427, 447, 37899, 61257]


def test_streams_steps_parameters_and_seeds_are_independent() -> None:
    base = Draw(0, 1, 0, 2).dither(1 << 16)
    others = [Draw(1, 1, 0, 2), Draw(0, 2, 0, 2), Draw(0, 1, 1, 2), Draw(0, 1, 0, 3)]
    others += [Draw(2**32, 1, 0, 2), Draw(0, 1, 0, 4)]
    for other in others:
        sample = torch.stack([base, other.dither(1 << 16)])
        assert abs(float(torch.corrcoef(sample)[0, 1])) < 0.02
        # streams 2 and 3 swap halves between neighbours, so those two are compared two apart
        assert abs(float(torch.corrcoef(torch.stack([base[2:], sample[1][:-2]]))[0, 1])) < 0.02


@pytest.mark.parametrize("stream", [2, 3])
def test_uniform_over_elements_and_over_steps(stream: int) -> None:
    elements = Draw(0, 5, 1, stream).dither(1 << 18)
    steps = torch.cat([Draw(0, t, 1, stream).at(12345).dither(64) for t in range(4096)])
    for draws in (elements, steps):
        counts = torch.histc(draws, 256, -0.5, 0.5)
        chi_squared = float(((counts - 1024) ** 2 / 1024).sum())
        assert 160 < chi_squared < 360  # 255 degrees of freedom, 4.6 deviations
        assert float(draws.min()) >= -0.5
        assert float(draws.max()) < 0.5


def test_mean_over_draws_is_exact() -> None:
    x = torch.randn(32, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(32, dtype=torch.float64)
    for step in range(1, 3126):
        bits = Draw(0, step, 0, 0).bits16(32 * 32)
        rounded = stochastic_round_bf16(x.repeat(32), bits)
        total += rounded.double().view(32, 32).sum(0)
    mean = total / (32 * 3125)
    assert float(((mean - x.double()) / x.double()).abs().max()) < 3e-5


EVERY_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("bits", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_representable_values_are_exact(bits: int) -> None:
    value = EVERY_BF16.view(torch.bfloat16)
    finite = torch.isfinite(value)
    rounded = stochastic_round_bf16(value.float(), torch.full((2**16,), bits, dtype=torch.int32))
    assert torch.equal(rounded.view(torch.int16)[finite], EVERY_BF16[finite])
    assert torch.equal(torch.isnan(rounded), torch.isnan(value))
    assert torch.equal(torch.isinf(rounded), torch.isinf(value))


@pytest.mark.parametrize("bits", [0, 1, 0x8000, 0xFFFF])
def test_every_kind_of_nan_stays_nan(bits: int) -> None:
    patterns = [0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0x7F80FFFF, -1, -0x7FFFFF]
    nan = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    assert torch.isnan(nan).all()
    assert torch.isnan(stochastic_round_bf16(nan, torch.full((6,), bits, dtype=torch.int32))).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_finite_becomes_infinite_only_where_nearest_would(sign: int) -> None:
    largest = 0x7F7F0000
    patterns = torch.tensor([largest + 0x1000, largest + 0x7FFF, largest + 0x9000])
    x = patterns.to(torch.int32).view(torch.float32) * sign
    for bits in (0, 0xFFFF):
        rounded = stochastic_round_bf16(x, torch.full((3,), bits, dtype=torch.int32))
        assert torch.isfinite(rounded[:2]).all()
    assert torch.isinf(rounded[2])


def test_small_steps_add_up() -> None:
    """1.0 minus 100 x 1e-3, which nearest rounding would leave at 1.0."""
    x = torch.ones(20000)
    for step in range(100):
        x = stochastic_round_bf16(x - 1e-3, Draw(0, step, 0, 0).bits16(20000)).float()
    assert abs(float(x.mean()) - 0.9) < 0.002
