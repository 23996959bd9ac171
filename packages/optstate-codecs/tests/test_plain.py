"""Numbers of other libraries become plain Python ones."""

from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import numpy
import pytest
import torch
from subjects import EXACT

from optstate_codecs import Adam, CodedOptimizer, GradientRelease, formats
from optstate_codecs.plain import plain_value


class Level(IntEnum):
    LOW = 3


PLAIN = [
    (numpy.float64(0.1), 0.1),
    (numpy.float32(0.1), 0.10000000149011612),
    (numpy.float16(0.5), 0.5),
    (numpy.longdouble(0.25), 0.25),
    (numpy.uint64(2**63), 2**63),
    (numpy.int8(-1), -1),
    (numpy.bool_(True), True),
    (numpy.str_("bf16"), "bf16"),
    (numpy.array(7), 7),
    (numpy.array([1, 2]), (1, 2)),
    (numpy.array([[0.5], [1.5]]), ((0.5,), (1.5,))),
    (Fraction(1, 4), 0.25),
    (Level.LOW, 3),
    (range(3), (0, 1, 2)),
    ([numpy.float32(0.5), (numpy.int64(1), "a")], [0.5, (1, "a")]),
    ({"a": {"b": numpy.int32(1)}}, {"a": {"b": 1}}),
]


@pytest.mark.parametrize(("value", "plain"), PLAIN, ids=lambda value: repr(value))
def test_numbers_become_plain(value, plain) -> None:
    found = plain_value(value)
    assert found == plain
    assert type(found) is type(plain)
    assert repr(found) == repr(plain)


@pytest.mark.parametrize(
    "value",
    [0.5, 3, True, None, "text", b"bytes", torch.ones(()), Decimal("0.5"), 1j, object(), {1, 2}],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_left_alone(value) -> None:
    assert plain_value(value) is value


def test_what_is_plain_already_is_the_same_object() -> None:
    betas = (0.9, 0.999)
    assert plain_value(betas) is betas


@pytest.mark.parametrize("name", formats.format_names())
def test_formats_of_numpy_numbers_are_those_of_plain_ones(name) -> None:
    given = {"min_elements": numpy.int64(64)}
    if any(option.name == "block_size" for option in type(formats.parse_format(name)).options()):
        given["block_size"] = numpy.int32(32)
    made = type(formats.parse_format(name))(**given)
    options = ", ".join(f"{key}={int(value)}" for key, value in sorted(given.items()))
    assert made == formats.parse_format(f"{name}({options})")
    assert {type(getattr(made, key)) for key in given} == {int}
    assert formats.parse_format(made.spec) == made


def test_clipping_takes_numpy_numbers() -> None:
    params = [torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2)]
    ours, released = (CodedOptimizer([p], Adam(), EXACT, lr=0.5) for p in params)
    ours.max_grad_norm = numpy.float32(2.5)
    theirs = torch.nn.Parameter(params[0].detach().clone())
    oracle = torch.optim.Adam([theirs], lr=0.5)
    release = GradientRelease(
        released, max_grad_norm=numpy.float64(2.5), bucket_bytes=numpy.int64(64)
    )
    assert type(release.max_grad_norm) is float
    for _ in range(2):
        for param in (params[0], theirs):
            param.grad = torch.tensor([6.0, 8.0])
        torch.nn.utils.clip_grad_norm_([theirs], 2.5)
        ours.step()
        oracle.step()
    assert ours.grad_norm.dtype == torch.float32
    assert torch.equal(params[0], theirs)
