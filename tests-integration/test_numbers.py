"""Numbers of other libraries as hyper-parameters: every argument of every optimizer takes them."""

import io
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import lowbit_adam
import stochbf16
import turboadam
from optstate_codecs import CodedOptimizer, offload
from optstate_codecs.arguments import arguments_of

FAMILY = [
    value
    for package in (lowbit_adam, turboadam, stochbf16)
    for value in map(vars(package).get, package.__all__)
    if isinstance(value, type) and issubclass(value, CodedOptimizer)
]
# what each argument is given; plain Python has every one of these exactly
GIVEN: dict[str, Any] = {
    "lr": numpy.float32(0.125),
    "betas": numpy.array([0.75, 0.875]),
    "beta": numpy.float16(0.75),
    "eps": numpy.float64(2.0**-20),
    "weight_decay": numpy.float32(0.5),
    "momentum": numpy.longdouble(0.5),
    "dampening": numpy.float64(0.25),
    "amp_fac": numpy.int64(2),
    "centralization": numpy.float32(0.5),
    "max_grad_norm": numpy.float32(0.25),
    "block_size": numpy.int32(64),
    "rounding_seed": numpy.uint64(3),
    "m_bits": numpy.int8(3),
    "v_bits": numpy.uint8(4),
    "null_pct": numpy.float32(0.125),
    "amp_pct": numpy.array(0.75),
    "min_m_compress_elements": numpy.int64(0),
    "min_v_compress_elements": numpy.uint16(0),
    "master_weight_bits": numpy.int64(24),
    "error_feedback": numpy.bool_(True),
    "maximize": numpy.bool_(True),
}
FLAGS = (
    *("amsgrad", "nesterov", "bf16_stochastic_round", "skip_nonfinite", "compress_m", "compress_v"),
    *("foreach", "fused", "capturable", "differentiable"),
)
GIVEN |= {flag: numpy.bool_(flag.startswith("compress")) for flag in FLAGS}
TEXT = {"backend", "formats", "weight_decay_mode", "rounding_key", "m_rounding", "mode"}


@pytest.fixture(params=FAMILY, ids=lambda cls: f"{cls.__module__.split('.')[0]}-{cls.__name__}")
def cls(request: pytest.FixtureRequest) -> type[CodedOptimizer]:
    return request.param


def given_to(cls: type[CodedOptimizer]) -> dict[str, Any]:
    given = {name: GIVEN[name] for name in arguments_of(cls) if name not in TEXT}
    if "smoothing" in getattr(cls, "__doc__", ""):
        given["betas"] = numpy.array([0.5, 0.75, 0.875])
    return given


def plainly(value: Any) -> Any:
    """The numbers as Python's, by numpy's own conversion."""
    value = value.tolist() if isinstance(value, (numpy.ndarray, numpy.generic)) else value
    value = float(value) if isinstance(value, numpy.longdouble) else value
    return tuple(value) if isinstance(value, list) else value


def parameters() -> list[nn.Parameter]:
    values = torch.arange(96.0).remainder(7).sub(3).div(4).view(4, 24)
    return [nn.Parameter(values.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]


def train(optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(steps):
        for param in params:
            wave = torch.arange(96.0).mul(step + 1).remainder(5).sub(2).div(8)
            param.grad = wave.view(4, 24).to(param.dtype)
        optimizer.step()
    return params


def foreign(value: Any, where: str) -> Iterator[str]:
    """Where a saved value holds anything but tensors and plain Python."""
    if type(value) in (dict, list, tuple):
        items = value.items() if type(value) is dict else enumerate(value)
        for key, item in items:
            yield from foreign(key, where)
            yield from foreign(item, f"{where}[{key!r}]")
    elif type(value) not in (int, float, bool, str, type(None), torch.Tensor):
        yield f"{where}: {type(value)}"


def assert_plain(optimizer: CodedOptimizer) -> None:
    for name in ("state_dict", "full_state_dict"):
        saved = getattr(optimizer, name)()
        assert list(foreign(saved, name)) == []
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert loaded["param_groups"] == saved["param_groups"]


def test_every_numeric_argument_is_tested(cls) -> None:
    assert set(arguments_of(cls)) - TEXT <= set(GIVEN)
    assert {"lr", "weight_decay", "max_grad_norm", "rounding_seed"} <= set(arguments_of(cls))


def test_numpy_arguments_are_those_of_plain_numbers(cls) -> None:
    given = given_to(cls)
    plain = {name: plainly(value) for name, value in given.items()}
    of_numpy, of_python = cls(parameters(), **given), cls(parameters(), **plain)
    assert list(foreign(of_numpy.defaults, "defaults")) == []
    (group,), (expected,) = of_numpy.param_groups, of_python.param_groups
    for key in expected.keys() - {"params"}:
        assert list(foreign(group[key], key)) == []
        assert group[key] == expected[key]

    for ours, theirs in zip(train(of_numpy), train(of_python), strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, parameters()[0 if ours.dtype == torch.float32 else 1])
    assert_plain(of_numpy)
    restored = cls(parameters(), **plain)
    restored.load_state_dict(of_numpy.state_dict())


def test_numpy_values_set_in_a_group_step_and_save_as_plain_ones(cls) -> None:
    kept = {"params", *cls.storage_options, *CodedOptimizer.shared_options}
    of_numpy, of_python = cls(parameters()), cls(parameters())
    given = {k: v for k, v in given_to(cls).items() if k in of_numpy.param_groups[0]}
    for key in given.keys() - kept:
        of_numpy.param_groups[0][key] = given[key]
        of_python.param_groups[0][key] = plainly(given[key])
    assert {"lr", "weight_decay", "rounding_seed"} <= given.keys()
    for ours, theirs in zip(train(of_numpy), train(of_python), strict=True):
        assert torch.equal(ours, theirs)
    assert_plain(of_numpy)


def test_numpy_values_of_one_group_are_kept_as_plain_ones(cls) -> None:
    first, second = parameters()
    given = {"params": [second], **{k: v for k, v in given_to(cls).items() if k in ("lr", "eps")}}
    optimizer = cls([{"params": [first]}, given])
    assert list(foreign(optimizer.param_groups[1]["lr"], "lr")) == []
    assert optimizer.param_groups[1]["lr"] == 0.125
    assert_plain(optimizer)


class Listed(Sequence):
    """A sequence that is neither list nor tuple, as configuration libraries have it."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __getitem__(self, place: Any) -> Any:
        return self.values[place]

    def __len__(self) -> int:
        return len(self.values)


class Index:
    """An integer to ``operator.index`` only."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize(
    "betas",
    [
        Listed(0.5, numpy.float32(0.75)),
        [numpy.float64(0.5), 0.75],
        (0.5, Fraction(3, 4)),
        numpy.array([0.5, 0.75], dtype=numpy.float32),
    ],
    ids=["sequence", "list", "fraction", "array"],
)
@pytest.mark.parametrize("cls", [cls for cls in FAMILY if "betas" in arguments_of(cls)])
def test_betas_are_any_sequence_of_numbers(cls, betas) -> None:
    third = "smoothing" in (cls.__doc__ or "")
    betas = Listed(*betas, 0.875) if third else betas
    optimizer, same = cls(parameters(), betas=betas), cls(parameters(), betas=tuple(betas))
    for ours, theirs in zip(train(optimizer), train(same), strict=True):
        assert torch.equal(ours, theirs)
    assert tuple(optimizer.param_groups[0]["betas"])[:2] == (0.5, 0.75)
    assert_plain(optimizer)


def test_other_numbers() -> None:
    optimizer = lowbit_adam.AdamW8bit(
        parameters(), lr=Fraction(1, 8), block_size=Index(64), rounding_seed=Index(5)
    )
    (group,) = optimizer.param_groups
    assert (group["lr"], group["block_size"], group["rounding_seed"]) == (0.125, 64, 5)
    assert list(foreign({k: v for k, v in group.items() if k != "params"}, "group")) == []


def test_tensors_stay_tensors(cls) -> None:
    lr = torch.tensor(0.125)
    optimizer = cls(parameters(), lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr
    assert isinstance(optimizer.state_dict()["param_groups"][0]["lr"], torch.Tensor)
    train(optimizer)


@pytest.mark.parametrize(
    ("argument", "value", "error", "words"),
    [
        ("lr", numpy.float64("nan"), ValueError, r"lr=.*nan.*: must be finite"),
        ("lr", numpy.bool_(True), TypeError, r"lr=.*True.*: must be a number, got bool"),
        ("lr", numpy.complex64(1), TypeError, r"lr=.*: must be a number, got complex64"),
        ("lr", numpy.array([1.0, 2.0]), TypeError, r"lr=\(1.0, 2.0\): must be a number"),
        ("lr", "1e-3", TypeError, "lr='1e-3': must be a number, got str"),
        ("weight_decay", numpy.float32(-1), ValueError, "weight_decay=.*: must be finite"),
        ("rounding_seed", numpy.float32(2), TypeError, "rounding_seed=.*: must be an int"),
        ("rounding_seed", numpy.int64(-1), ValueError, "rounding_seed=.*: must be from 0"),
        ("max_grad_norm", numpy.float64(0), ValueError, "max_grad_norm=.*: must be finite and"),
        ("skip_nonfinite", numpy.int64(1), TypeError, "skip_nonfinite=.*: must be True or False"),
    ],
)
def test_bad_numpy_values_are_refused_by_name(cls, argument, value, error, words) -> None:
    with pytest.raises(error, match=words):
        cls(parameters(), **{argument: value})


def test_the_manifest_of_a_file_has_plain_numbers(cls, tmp_path) -> None:
    path = tmp_path / "state"
    optimizer = cls(parameters(), **{k: v for k, v in given_to(cls).items() if k != "fused"})
    offload(optimizer, store="disk", path=path, chunk_bytes=numpy.int64(1 << 20))
    optimizer.param_groups[0]["lr"] = numpy.float32(0.25)
    train(optimizer)
    optimizer.state_dict()
    manifest = json.loads((tmp_path / "state.json").read_text())
    (group,) = manifest["param_groups"]
    assert group["lr"] == 0.25
    assert group["weight_decay"] == 0.5
    assert manifest["chunk_bytes"] == 1 << 20
