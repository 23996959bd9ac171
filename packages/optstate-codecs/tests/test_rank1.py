"""Rank-1 normalisation: the paper's formula, shapes and layouts, and what is stored."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from optstate_codecs import (
    Adam,
    CodedOptimizer,
    decode_state,
    parse_format,
    predicted_state_bytes,
    state_bytes,
)
from optstate_codecs.engine import StepRequest
from optstate_codecs.engine.triton.buckets import build_buckets
from optstate_codecs.formats import Linear4
from optstate_codecs.state.layout import bound

RANK1 = "linear4(normalization=rank1)"
FORMATS = {"exp_avg": "fp32", "exp_avg_sq": RANK1, "max_exp_avg_sq": RANK1}
LEVELS = np.delete(np.arange(1, 17) / 16, 2)
ONLY_SQUARES = {"betas": (0.9, 0.0)}  # the second moment is then the gradient's square


def gradient(shape, seed: int = 0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=noise)
    for axis, size in enumerate(shape):
        spread = torch.exp(torch.randn(size, generator=noise))
        x = x * spread.view(-1, *[1] * (len(shape) - 1 - axis))
    return x


def stepped(grad: torch.Tensor, steps: int = 1, exp_avg_sq: str = RANK1, **options):
    param = Parameter(torch.empty_like(grad).fill_(1.0))
    formats = {**FORMATS, "exp_avg_sq": exp_avg_sq}
    optimizer = CodedOptimizer([param], Adam(), formats, **options)
    for _ in range(steps):
        param.grad = grad.clone()
        optimizer.step()
    return param, optimizer


def by_the_paper(x: np.ndarray) -> np.ndarray:
    """Element by element: the least of the maxima, and the nearest level under it."""
    out = np.zeros_like(x)
    for place in itertools.product(*map(range, x.shape)):
        maxima = [np.take(x, index, axis=axis).max() for axis, index in enumerate(place)]
        scale = min(maxima)
        out[place] = scale * LEVELS[np.abs(x[place] - scale * LEVELS).argmin()] if scale else 0
    return out


LAYOUTS = ["contiguous", "transposed", "strided"]
SHAPES = [(9, 14), (3, 4, 5, 2), (5, 1, 7)]


@pytest.mark.parametrize(
    ("shape", "layout"), [*itertools.product(SHAPES, LAYOUTS), ((300, 230), "strided")], ids=str
)
def test_the_papers_formula(shape, layout: str) -> None:
    grad = gradient(shape)
    if layout == "transposed":
        grad = grad.transpose(0, -1).contiguous().transpose(0, -1)
    param = Parameter(torch.ones((*shape, 2))[..., 0] if layout == "strided" else grad.clone())
    optimizer = CodedOptimizer([param], Adam(), FORMATS, **ONLY_SQUARES)
    param.grad = grad
    optimizer.step()
    got = decode_state(optimizer, param)["exp_avg_sq"].double().numpy()
    np.testing.assert_allclose(got, by_the_paper(grad.double().numpy() ** 2), rtol=1e-5)
    largest = (grad**2).amax([d for d in range(grad.dim()) if d != 0])
    assert torch.equal(optimizer.state[param]["exp_avg_sq_scale0"], largest)


def test_bytes_and_names() -> None:
    _, optimizer = stepped(gradient((4, 1, 6, 5)), amsgrad=True)
    (state,) = optimizer.state.values()
    scales = {key: tuple(value.shape) for key, value in state.items() if "_scale" in key}
    assert scales == {
        f"{moment}_scale{axis}": (size,)
        for moment in ("exp_avg_sq", "max_exp_avg_sq")
        for axis, size in ((0, 4), (2, 6), (3, 5))
    }
    assert predicted_state_bytes(optimizer) == state_bytes(optimizer) == 12 + 480 + 2 * (60 + 60)


@pytest.mark.parametrize("shape", [(), (1,), (300,), (0,), (0, 5), (1, 300), (300, 1)], ids=str)
def test_vectors_have_blocks(shape) -> None:
    grad = gradient(shape)
    assert bound({"": parse_format(RANK1)}, grad)[""].components == Linear4().components
    param, ours = stepped(grad, 3)
    same, plain = stepped(grad, 3, exp_avg_sq="linear4")
    for key, value in plain.state[same].items():
        assert torch.equal(ours.state[param][key], value)
    assert predicted_state_bytes(ours) == state_bytes(ours)


def test_zeros_and_what_is_not_finite_stay_where_they_are() -> None:
    grad = gradient((6, 9))
    grad[2], grad[:, 4] = 0.0, 0.0
    spoilt = grad.clone()
    places = ([0, 0, 5, 2], [1, 7, 7, 4])  # crossing rows and columns, and where all else is zero
    spoilt[places] = torch.tensor([float("nan"), float("inf"), -float("inf"), float("nan")])
    grad[places] = 0.0
    clean, bad = (
        decode_state(optimizer, param)["exp_avg_sq"]
        for param, optimizer in (stepped(grad, **ONLY_SQUARES), stepped(spoilt, **ONLY_SQUARES))
    )
    others = torch.ones(6, 9, dtype=torch.bool)
    others[places] = False
    assert torch.equal(bad[others], clean[others])
    assert torch.isnan(bad[places]).all()
    assert (clean[2] == 0).all()
    assert (clean[:, 4] == 0).all()
    assert (clean[grad != 0] > 0).all()


def test_an_outlier_coarsens_its_row_and_column_only() -> None:
    grad = torch.ones(8, 16)
    grad[3, 5] = 1e3
    param, optimizer = stepped(grad, **ONLY_SQUARES)
    assert torch.equal(decode_state(optimizer, param)["exp_avg_sq"], grad**2)


def grow(optimizer, params, steps: int, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=noise)
        optimizer.step()


@pytest.mark.parametrize("there", ["contiguous", "channels last", "strided"])
@pytest.mark.parametrize("here", ["contiguous", "channels last"])
def test_checkpoints_move_between_layouts(here: str, there: str) -> None:
    layouts = {
        "contiguous": torch.ones(4, 3, 5, 2),
        "channels last": torch.ones(4, 3, 5, 2).to(memory_format=torch.channels_last),
        "strided": torch.ones(4, 3, 5, 4)[..., ::2],
    }
    formats = {"exp_avg": "int4(rounding=paired, units=update)", "exp_avg_sq": RANK1}
    source, target = (Parameter(layouts[name]) for name in (here, there))
    first = CodedOptimizer([source], Adam(), formats)
    grow(first, [source], 3, 0)
    second = CodedOptimizer([target], Adam(), formats)
    second.load_state_dict(first.state_dict())
    # what is encoded again under the same maxima has the same codes
    expected = decode_state(first, source)["exp_avg_sq"]
    assert torch.equal(decode_state(second, target)["exp_avg_sq"], expected)
    exact = torch.optim.Adam([target])
    exact.load_state_dict(first.full_state_dict())
    assert torch.equal(exact.state[target]["exp_avg_sq"], expected)
    second.load_state_dict(exact.state_dict())
    assert torch.equal(decode_state(second, target)["exp_avg_sq"], expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(copied) -> None:
    param, optimizer = stepped(gradient((7, 5)), 2)
    twin = copied(optimizer)
    (other,) = twin.param_groups[0]["params"]
    other.data.copy_(param.data)
    grow(optimizer, [param], 2, 1)
    grow(twin, [other], 2, 1)
    assert torch.equal(param, other)


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    _, optimizer = stepped(gradient((7, 5)))
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg_sq_scale1"] = torch.ones(7)
    message = r"exp_avg_sq_scale1'\]: size mismatch: shape \(7,\), must be.*\(5,\)"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    saved["state"][0]["exp_avg_sq_scale1"] = torch.full((5,), float("inf"))
    with pytest.raises(ValueError, match=r"exp_avg_sq_scale1'\]: must be finite"):
        optimizer.load_state_dict(saved)


def test_compiled_loops_leave_it_to_the_reference() -> None:
    """Also beyond a slice, where the reference takes several for other formats."""
    both = {}
    for backend in ("eager", "compile"):
        param, optimizer = stepped(gradient((300, 310)), 2, backend=backend)
        both[backend] = decode_state(optimizer, param)["exp_avg_sq"]
    assert torch.equal(both["eager"], both["compile"])


@pytest.mark.parametrize("shape", [(300, 310), (300,)], ids=str)
def test_kernels_leave_it_to_the_reference(shape) -> None:
    param, optimizer = stepped(gradient(shape))
    hyper = optimizer.rule.hyper(optimizer.param_groups[0])
    request = StepRequest(optimizer.rule, optimizer.stored_param_steps(), [param.grad], [hyper])
    assert build_buckets(request) == ([], [0])


def test_a_signed_moment_needs_a_signed_format() -> None:
    with pytest.raises(ValueError, match=r"formats\['exp_avg'\]='linear4': holds no negative"):
        CodedOptimizer([Parameter(torch.ones(3))], Adam(), {**FORMATS, "exp_avg": "linear4"})
