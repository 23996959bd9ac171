"""The arguments of every optimizer of the family: all named in errors, all given as text."""

from typing import Any

import pytest
import torch

import lowbit_adam
import stochbf16
import turboadam
from optstate_codecs import CodedOptimizer, typed_arguments
from optstate_codecs.arguments import ELSEWHERE, arguments_of

FAMILY = [
    value
    for package in (lowbit_adam, turboadam, stochbf16)
    for value in map(vars(package).get, package.__all__)
    if isinstance(value, type) and issubclass(value, CodedOptimizer)
]
SHARED = {
    *("lr", "weight_decay", "maximize", "backend", "rounding_seed", "skip_nonfinite"),
    *("max_grad_norm", "master_weight_bits", "centralization", "rounding_key"),
    *("foreach", "fused", "capturable", "differentiable"),
}
LOWBIT = {"block_size", "bf16_stochastic_round"}
ADAM = {"betas", "eps", "amsgrad"}
OWN = {
    **{
        f"lowbit_adam.adam.{name}": {*LOWBIT, *ADAM, "formats"}
        for name in ("Adam8", "Adam8bit", "AdamFp8", "AdamW8", "AdamW8bit", "AdamWFp8")
    },
    **{
        f"lowbit_adam.adam.{name}": {*LOWBIT, *ADAM, "formats", "error_feedback"}
        for name in ("Adam4bit", "AdamW4bit")
    },
    "lowbit_adam.momentum.Lion8bit": {*LOWBIT, "betas"},
    "lowbit_adam.momentum.Lion8": {*LOWBIT, "betas"},
    "lowbit_adam.momentum.SGD8": {*LOWBIT, "momentum", "dampening", "nesterov"},
    "lowbit_adam.momentum.SGD8bit": {*LOWBIT, "momentum", "dampening", "nesterov"},
    "turboadam.adam": {
        *(*LOWBIT, *ADAM, "m_bits", "v_bits", "compress_m", "compress_v", "null_pct", "amp_pct"),
        *("error_feedback", "min_m_compress_elements", "min_v_compress_elements", "m_rounding"),
        "mode",
    },
    "stochbf16.optimizers.AdamW": {*ADAM, "weight_decay_mode"},
    "stochbf16.optimizers.Adam": ADAM,
    "stochbf16.optimizers.Compass": {"betas", "eps", "amp_fac", "weight_decay_mode"},
    "stochbf16.optimizers.LPFAdamW": {"betas", "eps", "amp_fac", "weight_decay_mode"},
    "stochbf16.optimizers.RMSProp": {"beta", "eps"},
    "stochbf16.optimizers.SGD": {"momentum", "dampening", "nesterov"},
    "stochbf16.optimizers.Lion": {"betas"},
}
# what a launcher may hand each argument, and what that is
AS_TEXT: dict[str, tuple[str, Any]] = {
    "lr": ("3e-4", 3e-4),
    "betas": ("(0.9,0.95)", (0.9, 0.95)),
    "beta": ("0.99", 0.99),
    "eps": ("1e-6", 1e-6),
    "weight_decay": ("0.1", 0.1),
    "momentum": (".5", 0.5),
    "dampening": ("0", 0.0),
    "amp_fac": ("2", 2.0),
    "centralization": ("1", 1.0),
    "max_grad_norm": ("1.0", 1.0),
    "block_size": ("256", 256),
    "rounding_seed": ("7", 7),
    "rounding_key": ("layers.0", "layers.0"),
    "m_bits": ("3", 3),
    "v_bits": ("4", 4),
    "null_pct": ("0.1", 0.1),
    "amp_pct": ("none", None),
    "min_m_compress_elements": ("0", 0),
    "min_v_compress_elements": ("16", 16),
    "master_weight_bits": ("24", 24),
    "m_rounding": ("stochastic", "stochastic"),
    "mode": ("adamw", "adamw"),
    "backend": ("eager", "eager"),
    "weight_decay_mode": ("bias_corrected", "bias_corrected"),
    "formats": ("{exp_avg: bf16}", {"exp_avg": "bf16"}),
    "bf16_stochastic_round": ("no", False),
    "differentiable": ("false", False),
    "foreach": ("None", None),
    "fused": ("0", False),
}
FLAGS = (
    *("amsgrad", "maximize", "nesterov", "compress_m", "compress_v", "capturable"),
    *("error_feedback", "skip_nonfinite"),
)
AS_TEXT |= dict.fromkeys(FLAGS, ("true", True))


@pytest.fixture(params=FAMILY, ids=lambda cls: f"{cls.__module__.split('.')[0]}-{cls.__name__}")
def cls(request: pytest.FixtureRequest) -> type[CodedOptimizer]:
    return request.param


def expected(cls: type[CodedOptimizer]) -> set[str]:
    own = OWN.get(cls.__module__) or OWN[f"{cls.__module__}.{cls.__name__}"]
    return {*SHARED, *own}


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(4, 5))]


def unknown(cls: type[CodedOptimizer], name: str) -> str:
    with pytest.raises(TypeError) as caught:
        cls(params(), **{name: 1})
    return str(caught.value)


def test_arguments_are_found(cls) -> None:
    assert set(arguments_of(cls)) == expected(cls)


def test_an_unknown_argument_is_told_all_there_are(cls) -> None:
    start, _, known = unknown(cls, "foo").partition("; known are ")
    assert start == f"foo: unknown argument of {cls.__name__}"
    assert set(known.split(", ")) == expected(cls)
    assert len(known.split(", ")) == len(expected(cls))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("weight_dacay", "weight_decay"),
        ("master_weights_bits", "master_weight_bits"),
        ("skip_non_finite", "skip_nonfinite"),
        ("Backend", "backend"),
    ],
)
def test_the_nearest_argument_is_suggested(cls, typed, meant) -> None:
    message = unknown(cls, typed)
    assert message.startswith(
        f"{typed}: unknown argument of {cls.__name__} (did you mean {meant}?)"
    )


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_names_of_other_libraries_are_explained(cls, name) -> None:
    start, _, known = unknown(cls, name).partition("; known are ")
    assert start.startswith(f"{name}: unknown argument of {cls.__name__} (here: ")
    assert set(known.split(", ")) == expected(cls)


@pytest.mark.parametrize(
    ("optimizer", "name", "here"),
    [
        (lowbit_adam.AdamW8bit, "min_8bit_size", "min_elements of each of formats"),
        (turboadam.TurboAdam, "min_8bit_size", "min_m_compress_elements and min_v_compress"),
        (lowbit_adam.Lion8bit, "min_8bit_size", "tensors of every size"),
        (stochbf16.AdamW, "min_8bit_size", "tensors of every size"),
        (lowbit_adam.AdamW8bit, "is_paged", "optstate_codecs.offload"),
        (lowbit_adam.AdamW8bit, "optim_bits", "AdamW8bit and AdamW4bit"),
        (turboadam.TurboAdam, "optim_bits", "m_bits and v_bits"),
        (lowbit_adam.AdamW8bit, "percentile_clipping", "max_grad_norm"),
        (lowbit_adam.AdamW8bit, "block_wise", "in blocks of block_size elements"),
        (stochbf16.AdamW, "block_wise", "no blocks"),
        (lowbit_adam.AdamW8bit, "compress_state_dict", "state_dict.. is packed"),
        (lowbit_adam.AdamW8bit, "args", "typed_arguments"),
    ],
)
def test_what_another_library_means_depends_on_the_class(optimizer, name, here) -> None:
    with pytest.raises(TypeError, match=rf"{name}: unknown argument of .* \(here: .*{here}"):
        optimizer(params(), **{name: 1})


def test_what_is_said_of_min_elements_is_right() -> None:
    def bits(min_elements: int) -> set[str]:
        formats = {
            "exp_avg": f"dynamic8(min_elements={min_elements})",
            "exp_avg_sq": f"dynamic8(signed=False, domain=sqrt, min_elements={min_elements})",
        }
        (param,) = params()
        optimizer = lowbit_adam.AdamW8bit([param], formats=formats)
        param.grad = torch.ones(4, 5)
        optimizer.step()
        return set(optimizer.state[param])

    assert bits(21) == {"step", "exp_avg", "exp_avg_sq"}
    assert "exp_avg_codes" in bits(20)


def test_every_argument_is_given_as_text(cls) -> None:
    given = {name: AS_TEXT[name] for name in expected(cls)}
    if cls.__name__ == "LPFAdamW":
        given["betas"] = ("0.9,0.9,0.95", (0.9, 0.9, 0.95))
    values = {name: value for name, (_, value) in given.items()}
    found = typed_arguments(cls, {name: text for name, (text, _) in given.items()})
    assert found == values
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in values.items()
    }
    together = ",".join(f"{name}={text}" for name, (text, _) in given.items())
    assert typed_arguments(cls, together) == values

    (group,) = cls(params(), **found).param_groups
    for name in values.keys() & group.keys() - {"formats"}:
        assert group[name] == values[name]


def test_what_a_launcher_hands_over() -> None:
    found = typed_arguments(
        lowbit_adam.AdamW8bit,
        {"block_size": "256", "betas": "0.9,0.95", "bf16_stochastic_round": "true", "lr": 1e-4},
    )
    assert found == {
        "block_size": 256,
        "betas": (0.9, 0.95),
        "bf16_stochastic_round": True,
        "lr": 1e-4,
    }
    with pytest.raises(TypeError, match=r"amp_pct: unknown argument of AdamW8bit"):
        typed_arguments(lowbit_adam.AdamW8bit, {"amp_pct": "none"})
    assert typed_arguments(turboadam.TurboAdam, {"amp_pct": "none"}) == {"amp_pct": None}
