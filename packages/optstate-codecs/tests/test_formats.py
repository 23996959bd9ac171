"""Formats: round trips, error bounds, symmetry, zero, NaN; and their texts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from optstate_codecs import (
    BF16,
    FP8,
    FP32,
    Adam,
    CodedOptimizer,
    CoState,
    Dynamic8,
    Int4,
    Int8,
    Minifloat,
    OneQ,
    parse_format,
)
from optstate_codecs.formats import (
    FP16,
    Format,
    Linear4,
    as_format,
    format_names,
    register_format,
    registry,
)
from optstate_codecs.formats.dynamic import value_table
from optstate_codecs.rounding import Draw

SIGNED = [
    FP32(),
    BF16("nearest"),
    FP16(16),
    FP16(256),
    Int8(16),
    Int8(64, "stochastic"),
    Dynamic8(16),
    Dynamic8(16, base=10),
    Dynamic8(256, rounding="stochastic"),
    FP8(16),
    FP8(64, rounding="paired"),
    Int4(16),
    Minifloat(3, 4, 64, signed=True, rounding="stochastic"),
    Minifloat(1, 2, 32, signed=True, rounding="paired"),
    CoState(1, 16),
    CoState(2, 64),
    CoState(3, 16),
    CoState(4, 32),
    CoState(6, 16),
    CoState(3, 64, 0.8, 0.1),
    CoState(1, 16, levels="normal"),
    CoState(2, 64, levels="normal"),
    CoState(3, 32, levels="normal"),
    CoState(4, 16, levels="normal"),
]
UNSIGNED = [
    Dynamic8(16, signed=False),
    Dynamic8(16, signed=False, base=10),
    Dynamic8(64, signed=False, rounding="stochastic"),
    Dynamic8(64, signed=False, domain="sqrt"),
    Dynamic8.second_moment(256),
    FP8(16, signed=False),
    Minifloat(2, 2, 16),
    Minifloat(2, 2, 64, rounding="stochastic"),
    Minifloat.second_moment4(16),
    Minifloat.second_moment8(64),
    Linear4(16),
    OneQ(2, 16),
    OneQ(3, 64),
    OneQ(4, 16),
    OneQ(6, 32),
    OneQ(8, 64),
]
BOTH = SIGNED + UNSIGNED


def ids(format: Format) -> str:
    return format.spec


def store(format: Format, x: torch.Tensor, step: int = 1) -> list[torch.Tensor]:
    parts = [torch.zeros(c.length(x.numel()), dtype=c.dtype) for c in format.components]
    format.encode(x, parts, Draw(0, step, 0, 3))
    return parts


def round_trip(format: Format, x: torch.Tensor, step: int = 1) -> torch.Tensor:
    return format.decode(store(format, x, step))[: x.numel()].clone()


def sample(format: Format, numel: int = 1000, scale: float = 1.0) -> torch.Tensor:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)) * scale
    return x if format in SIGNED else x * x


def has_zero(format: Format) -> bool:
    """Whether zeros and what is not finite have codes; with one and two bits signs take all."""
    return not (isinstance(format, CoState) and (format.bits < 3 or format.levels == "normal"))


def means_its_input(format: Format) -> bool:
    """Whether the mean of many draws is what was encoded: nothing lifted, nothing cut off."""
    if isinstance(format, CoState):
        return has_zero(format) and format.amp_pct is None
    return not (isinstance(format, OneQ) or getattr(format, "lift", 0))


def coarsest_step(format: Format) -> float:
    """Of a power of two above the block's largest; twice as coarse in v where roots are kept."""
    if isinstance(format, OneQ):
        step = {2: 1, 3: 1, 4: 1 / 2, 6: 1 / 8, 8: 1 / 32}[format.bits]
        return step * (2 + step)
    if isinstance(format, CoState):
        # a scale from the mean is at most so many times the largest; others are rounded up
        cut = not means_its_input(format)
        return 1.7 if cut else 1.008 / (2 ** (format.bits - 1) - 1)
    if isinstance(format, Minifloat):
        step = 2.0**-format.mantissa_bits
        return step * (2 + step) if format.domain == "sqrt" else step
    if isinstance(format, (Int4, Linear4)):
        return 1 / 7 if isinstance(format, Int4) else 1 / 16
    return 1 / 8 if isinstance(format, FP8) else 0.029


finite = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
vectors = st.lists(finite, min_size=1, max_size=100)


@pytest.mark.parametrize("format", BOTH, ids=ids)
@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 129, 4097])
def test_bytes_are_the_declared_ones(format: Format, numel: int) -> None:
    parts = store(format, sample(format, numel))
    assert sum(p.numel() * p.element_size() for p in parts) == format.nbytes(numel)


@pytest.mark.parametrize("format", BOTH, ids=ids)
def test_zero_bytes_decode_to_zero(format: Format) -> None:
    parts = [torch.zeros(c.length(100), dtype=c.dtype) for c in format.components]
    assert torch.equal(format.decode(parts)[:100], torch.zeros(100))
    assert torch.equal(round_trip(format, torch.zeros(100)), torch.zeros(100))


@pytest.mark.parametrize("format", BOTH, ids=ids)
@given(values=vectors)
@settings(max_examples=40, deadline=None)
def test_nothing_grows_beyond_a_step_of_the_grid(format: Format, values: list[float]) -> None:
    x = torch.tensor(values)
    x = x if format in SIGNED else x.abs()
    y = round_trip(format, x)
    blocks = torch.nn.functional.pad(x.abs(), (0, -x.numel() % format.span)).view(-1, format.span)
    top = blocks.amax(1, keepdim=True).expand_as(blocks).reshape(-1)[: x.numel()]
    power = torch.exp2(torch.ceil(torch.log2(top.clamp_min(1e-30))))
    assert ((x - y).abs() <= coarsest_step(format) * power + 1e-6 * top + 1e-30).all()


@pytest.mark.parametrize(
    # levels that follow the root mean square of the block change with what is stored
    "format",
    [f for f in BOTH if not (f.uses_random or getattr(f, "levels", "even") == "normal")],
    ids=ids,
)
@given(values=st.lists(finite, min_size=1, max_size=15))
@settings(max_examples=40, deadline=None)
def test_encoding_again_changes_nothing(format: Format, values: list[float]) -> None:
    # without the first element a block's largest may round down into a lower binade
    x = torch.tensor([1.4e6, *values])
    once = store(format, x if format in SIGNED else x.abs())
    again = store(format, format.decode(once)[: len(values) + 1])
    assert torch.equal(again[0], once[0])


@pytest.mark.parametrize(
    "format", [f for f in SIGNED if not f.uses_random and has_zero(f)], ids=ids
)
@given(values=vectors)
@settings(max_examples=40, deadline=None)
def test_sign_symmetry(format: Format, values: list[float]) -> None:
    x = torch.tensor(values)
    assert torch.equal(round_trip(format, -x), -round_trip(format, x))


@pytest.mark.parametrize("format", [f for f in BOTH if not f.uses_random], ids=ids)
def test_monotone(format: Format) -> None:
    x = torch.linspace(-1, 1, 4001) if format in SIGNED else torch.linspace(0, 1, 4001)
    x = torch.cat([x, x.new_zeros(-x.numel() % 16)])
    for block in x.view(-1, 16)[:-1]:
        assert (round_trip(format, block).diff() >= 0).all()


@pytest.mark.parametrize(
    "format", [f for f in BOTH if f.uses_random and means_its_input(f)], ids=ids
)
def test_stochastic_rounding_is_unbiased_in_its_domain(format: Format) -> None:
    x = sample(format, 64)
    sqrt = getattr(format, "domain", "linear") == "sqrt"
    draws = torch.stack([round_trip(format, x, step) for step in range(4000)]).double()
    if sqrt:
        draws, x = draws.sqrt(), x.sqrt()
    error = (draws.mean(0) - x).abs()
    deviation = draws.std(0) / 4000**0.5
    # positive numbers below the first point are raised to it
    first = draws[draws > 0].min() if format in UNSIGNED else 0
    # 16 bits of randomness leave a bias of at most 2^-17 of a step
    assert (error <= 5 * deviation + 1e-5 * x.abs().max())[x.abs() >= first].all()


@pytest.mark.parametrize("format", UNSIGNED, ids=ids)
@given(exponents=st.lists(st.floats(-37, 37), min_size=2, max_size=60))
@settings(max_examples=60, deadline=None)
def test_positive_never_decodes_to_zero(format: Format, exponents: list[float]) -> None:
    x = torch.tensor([10.0**e for e in exponents])
    assert (round_trip(format, x) > 0).all()
    assert format.keeps_positive
    assert not format.keeps_sign


# 1Q raises the lowest octave of a marked block, which ``test_oneq`` says
@pytest.mark.parametrize(
    "format", [f for f in BOTH if has_zero(f) and not isinstance(f, OneQ)], ids=ids
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_stays_where_it_is(format: Format, bad: float) -> None:
    if format in UNSIGNED and bad < 0:
        bad = float("nan")
    x = sample(format, 100)
    places = torch.tensor([0, 40, 99])
    y = round_trip(format, x.index_fill(0, places, bad))
    clean = round_trip(format, x.index_fill(0, places, 0.0))
    others = torch.ones(100, dtype=torch.bool).index_fill(0, places, False)
    assert not torch.isfinite(y[places]).any()
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("base", [8, 10])
@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_against_its_formula(signed: bool, base: int) -> None:
    """The 256 values by linspace in float64, and nearest rounding by search."""
    table = value_table(signed, base, torch.device("cpu"))
    steps = [2**d * (1 if signed else 2) for d in range(7)]
    points = [
        point
        for d, n in enumerate(steps)
        for point in np.linspace(float(base) ** (d - 7), float(base) ** (d - 6), n + 1)[1:]
    ]
    points = [point - float(base) ** -7 for point in points]
    expected = np.array([0.0, *points])
    if signed:
        got = table[:128].numpy()
        assert torch.equal(table[128:], -table[:128])
    else:
        got = table[:255].numpy()
    np.testing.assert_allclose(got, expected, rtol=2e-7)

    x = torch.rand(20000, generator=torch.Generator().manual_seed(0)) ** 6
    x = x * 0.99
    y = round_trip(Dynamic8(8192, signed=signed, base=base), x[:8192])
    exact = x[:8192].double().numpy()
    nearest = np.abs(expected[:, None] - exact).min(0)
    above = exact > expected[1]
    # positions are in units of 2^-16, so a near tie may go either way
    assert (
        np.abs(y.numpy() - exact)[above] <= nearest[above] * 1.001 + 2e-7 * exact[above] + 1e-9
    ).all()


@pytest.mark.parametrize("bits", [-40, -3, 1, 40])
@pytest.mark.parametrize("format", [*SIGNED[2:], *UNSIGNED], ids=ids)
def test_codes_do_not_see_powers_of_two(format: Format, bits: int) -> None:
    if getattr(format, "domain", "linear") == "sqrt":
        bits = 2 * bits
    x = sample(format)
    assert torch.equal(store(format, x)[0], store(format, x * 2.0**bits)[0])


def test_dynamic8_scale_covers_the_block() -> None:
    for top in (1.0, 1.5, 2.0, 3e-20, 1e30):
        scale = store(Dynamic8(16), torch.tensor([top, -top / 3]))[1]
        assert top <= float(scale) <= 2 * top
    assert float(store(Dynamic8(16), torch.tensor([1.5, float("inf")]))[1]) == -2


@pytest.mark.parametrize("format", [*BOTH, Dynamic8.first_moment(512)], ids=ids)
def test_text_round_trip(format: Format) -> None:
    assert parse_format(format.spec) == format
    assert as_format(format.spec) is parse_format(format.spec)
    assert as_format(format) is format


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "int3",
            "must be one of bf16, costate, dynamic4, dynamic8, fp16, fp32, fp8, int4, int8, "
            "linear4, minifloat, oneq",
        ),
        ("int8(block=3)", "option 'block' must be one of block_size, rounding, units"),
        ("int8(block_size=100)", "block_size=100: must be a power of two from 16 to 8192"),
        ("int8(block_size=8)", "power of two from 16 to 8192"),
        ("dynamic8(base=16)", "base=16: must be 8 or 10"),
        ("dynamic8(domain=sqrt)", "domain='sqrt': needs signed=False"),
        ("dynamic8(signed=False, units=update)", "units='update': needs signed=True"),
        ("bf16(rounding=up)", "rounding='up': must be one of 'stochastic', 'nearest'"),
        ("linear4(normalization=row)", "normalization='row': must be one of 'block', 'rank1'"),
        ("int8(", "format='int8('"),
    ],
)
def test_bad_texts(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        parse_format(text)


@dataclass(frozen=True)
class Doubled(FP32):
    """A format of a script: twice the moment."""

    name: ClassVar[str] = "doubled"

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        parts[0].copy_(x * 2)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] / 2


def test_registered_formats_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(registry._classes())
    monkeypatch.setattr(registry, "_classes", lambda: known)
    weight = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"format='doubled': must be one of .*register_format"):
        CodedOptimizer([weight], Adam(), {"exp_avg": Doubled(), "exp_avg_sq": "fp32"})

    assert register_format(Doubled) is Doubled
    assert "doubled" in format_names()
    assert parse_format("doubled(min_elements=2)") == Doubled(min_elements=2)
    optimizer = CodedOptimizer([weight], Adam(), {"exp_avg": Doubled(), "exp_avg_sq": "fp32"})
    weight.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["exp_avg"], torch.full((4,), 0.2))

    # defined anew, as in a notebook
    again = dataclass(frozen=True)(type("Doubled", (Doubled,), {"__module__": __name__}))
    assert type(parse_format(register_format(again).name)) is again

    with pytest.raises(ValueError, match=r"Other.name='int8': is the name of Int8"):
        register_format(type("Other", (Doubled,), {"name": "int8"}))
    with pytest.raises(ValueError, match=r"Other.name='a b': must be letters"):
        register_format(type("Other", (Doubled,), {"name": "a b"}))
    with pytest.raises(TypeError, match="must be a subclass of Format"):
        register_format(Doubled())  # type: ignore[type-var]
    assert type(parse_format("int8")) is Int8


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"block_size=16\.0: must be an int"):
        Int8(16.0)
    with pytest.raises(TypeError, match="block_size=True: must be an int"):
        Int8(True)
    with pytest.raises(TypeError, match="must be a Format or its text, got int"):
        as_format(8)
    with pytest.raises(ValueError, match="draw=None"):
        Int8(16, "stochastic").encode(torch.ones(4), [torch.zeros(4), torch.zeros(1)])


@pytest.mark.parametrize(("format", "values"), [("dynamic4", 16), ("linear4", 15)])
def test_published_maps_of_four_bits(format: str, values: int) -> None:
    """Decades cut into 1, 2 and 4 parts, their middles; and sixteenths without the third."""
    parsed = parse_format(format)
    if format == "linear4":
        expected = np.delete(np.arange(1, 17) / 16, 2)
    else:
        edges = [np.linspace(10.0**d, 10.0 ** (d + 1), 2 ** (d + 3) + 1) for d in (-3, -2, -1)]
        side = np.concatenate([(edge[1:] + edge[:-1]) / 2 for edge in edges])
        expected = np.concatenate([-side[::-1], [0.0], side, [1.0]])
    np.testing.assert_allclose(parsed.values, expected)
    assert len(parsed.values) == values

    x = torch.linspace(0.0 if format == "linear4" else -1.0, 1.0, 129)[1:]
    exact = x.double().numpy()
    nearest = np.abs(expected[:, None] - exact).min(0)
    error = np.abs(round_trip(parsed, x).numpy() - exact)
    np.testing.assert_allclose(error, nearest, atol=1e-6)

    spoilt = round_trip(parsed, x.index_fill(0, torch.tensor([3, 70]), float("nan")))
    assert torch.isnan(spoilt).nonzero().view(-1).tolist() == [3, 70]
    assert torch.equal(round_trip(parsed, torch.zeros(5)), torch.zeros(5))


def test_names_are_listed() -> None:
    assert set(format_names()) >= {"fp32", "bf16", "int8", "dynamic8"}


def test_component_shapes_follow_rows_where_blocks_fit() -> None:
    codes, scale = Dynamic8(64).components
    shapes = [(8, 128), (3, 5, 64), (61, 83), (129,), (1,), (0,), (0, 64), ()]
    assert [codes.shape(s) for s in shapes] == shapes
    expected = [(8, 2), (3, 5, 1), (80,), (3,), (1,), (0,), (0, 1), (1,)]
    assert [scale.shape(s) for s in shapes] == expected
    for shape, kept in itertools.zip_longest(shapes, expected):
        assert scale.length(int(np.prod(shape))) == int(np.prod(kept))
