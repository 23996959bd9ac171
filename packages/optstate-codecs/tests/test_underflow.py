"""Second moments that have underflowed beside first moments that have not."""

import pytest
import torch
from subjects import FIRST, SECOND

from optstate_codecs import (
    FP8,
    Adam,
    CodedOptimizer,
    CoState,
    Int4,
    Minifloat,
    OneQ,
    convert,
    decode_state,
)

FORMATS = {
    "dynamic8": (FIRST, SECOND),
    "fp8": (FP8.first_moment(256).spec, Minifloat.second_moment8(256).spec),
    "int8": ("int8(rounding=stochastic, units=update)", "fp32"),
    "int4": (Int4.first_moment().spec, Minifloat.second_moment4().spec),
    "costate-4": (CoState(4).spec, OneQ(4).spec),
    "costate-2": (CoState(2).spec, OneQ(3).spec),
    "costate-1": (CoState(1).spec, OneQ(3).spec),
}
LR, NUMEL, PLACE = 1e-3, 512, 7
OTHERS = torch.arange(NUMEL) != PLACE
# what a steady gradient may make of m / sqrt(v) at betas .9 and .999: 0.1 / sqrt(0.001 (1 - .81 /
# .999)), by the Cauchy-Schwarz inequality
LONGEST = 7.3

each_format = pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)


def moments() -> tuple[torch.Tensor, torch.Tensor]:
    """Those of gradients around 0.1, in one place of a gradient of 1e-4: 1e-8 is 0 in float16."""
    generator = torch.Generator().manual_seed(0)
    first = (torch.rand(NUMEL, generator=generator) - 0.5) * 0.2
    second = torch.rand(NUMEL, generator=generator) * 0.01 + 0.002
    first[PLACE], second[PLACE] = 1e-4, 1e-8
    return first, second


def loaded(formats, first, second, dtype=torch.float16, **options) -> CodedOptimizer:
    """An optimizer that goes on from a checkpoint of ``torch.optim``'s at step 1,000."""
    source = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(NUMEL))], lr=LR, weight_decay=0)
    saved = source.state_dict()
    kept = {"exp_avg": first.to(dtype), "exp_avg_sq": second.to(dtype)}
    saved["state"] = {0: {"step": torch.tensor(1000.0), **kept}}
    chosen = dict(zip(("exp_avg", "exp_avg_sq"), formats, strict=True))
    param = torch.nn.Parameter(torch.zeros(NUMEL))
    optimizer = CodedOptimizer([param], Adam(decoupled=True), chosen, **options)
    optimizer.load_state_dict(saved)
    return optimizer


def decoded(optimizer: CodedOptimizer) -> dict[str, torch.Tensor]:
    return decode_state(optimizer, optimizer.param_groups[0]["params"][0])


def error(got: torch.Tensor, due: torch.Tensor) -> float:
    return float((got - due)[OTHERS].norm() / due[OTHERS].norm())


@each_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "subnormal"])
def test_a_checkpoint_that_underflowed_keeps_all_first_moments(formats, dtype) -> None:
    first, second = moments()
    # without the place: what the format makes of the others
    alone = [torch.where(OTHERS, moment, 0.0) for moment in (first, second)]
    usual = error(decoded(loaded(formats, *alone))["exp_avg"], first)
    if dtype == torch.float16:
        assert second.half()[PLACE] == 0
    else:
        second[PLACE] = 1e-40
    found = decoded(loaded(formats, first, second, dtype))
    assert error(found["exp_avg"], first) <= 1.1 * usual + 1e-3
    assert found["exp_avg_sq"][PLACE] > 0
    assert found["exp_avg"][PLACE].abs() <= LONGEST * found["exp_avg_sq"][PLACE].sqrt()


@each_format
def test_the_step_after_it_is_that_of_torch_and_nowhere_longer(formats) -> None:
    first, second = moments()
    grad = torch.linspace(-0.1, 0.1, NUMEL)
    grad[PLACE] = 0.0
    exact = torch.nn.Parameter(torch.zeros(NUMEL))
    theirs = torch.optim.AdamW([exact], lr=LR, weight_decay=0)
    saved = theirs.state_dict()
    kept = {"exp_avg": first.half().float(), "exp_avg_sq": second.half().float()}
    saved["state"] = {0: {"step": torch.tensor(1000.0), **kept}}
    theirs.load_state_dict(saved)

    exact.grad = grad
    theirs.step()
    assert exact[PLACE].abs() > 1000 * LR  # from that state, torch's step is far too long

    errors = []
    for kept in (torch.ones(NUMEL, dtype=torch.bool), OTHERS):
        ours = loaded(formats, first * kept, second * kept, lr=LR, weight_decay=0.0)
        (param,) = ours.param_groups[0]["params"]
        param.grad = grad.clone()
        ours.step()
        assert param[PLACE].abs() <= LONGEST * LR
        errors.append(error(param.detach(), exact.detach()))
    assert errors[0] <= 1.1 * errors[1] + 1e-3


@each_format
@pytest.mark.parametrize(
    ("m", "v"),
    [
        (float("nan"), 0.0),
        (float("inf"), 0.0),
        (float("nan"), 1e-8),
        (-float("inf"), 1e-8),
        (1e-4, float("nan")),
        (1e-4, float("inf")),
        (float("inf"), float("inf")),
        (3e38, 0.0),
        (1e-30, 0.0),
    ],
    ids=[
        "m-nan",
        "m-inf",
        "only-m-nan",
        "only-m-inf",
        "v-nan",
        "v-inf",
        "both-inf",
        "m-huge",
        "m-tiny",
    ],
)
def test_what_else_a_checkpoint_may_hold_stays_where_it_is(formats, m, v) -> None:
    first, second = moments()
    usual = error(decoded(loaded(formats, first, second, torch.float32))["exp_avg"], first)
    first[PLACE], second[PLACE] = m, v
    found = decoded(loaded(formats, first, second, torch.float32))
    assert bool(found["exp_avg"][OTHERS].isfinite().all())
    assert error(found["exp_avg"], first) <= 1.1 * usual + 1e-3
    finite = [bool(found[key][PLACE].isfinite()) for key in ("exp_avg", "exp_avg_sq")]
    # a gradient such as 3e38 has an infinite square in float32
    assert all(finite) == bool(torch.tensor([m, v, m * m], dtype=torch.float32).isfinite().all())


@each_format
def test_a_step_whose_squared_gradient_underflows_leaves_the_block_alone(formats) -> None:
    """1e-25 has a square that no float32 holds: v stays zero beside an m that does not."""
    chosen = dict(zip(("exp_avg", "exp_avg_sq"), formats, strict=True))
    found = []
    for small in (1e-25, 0.0):
        param = torch.nn.Parameter(torch.zeros(NUMEL))
        optimizer = CodedOptimizer([param], Adam(decoupled=True), chosen, backend="eager", lr=LR)
        for _ in range(5):
            param.grad = torch.linspace(-0.1, 0.1, NUMEL)
            param.grad[PLACE] = small
            optimizer.step()
        found.append(decoded(optimizer)["exp_avg"])
        assert param[PLACE].abs() <= LONGEST * LR
    torch.testing.assert_close(found[0][OTHERS], found[1][OTHERS], rtol=1e-5, atol=0)


def test_converters_and_checkpoints_raise_alike() -> None:
    first, second = moments()
    second[PLACE] = 0.0
    stored = {"step": 3, "exp_avg": first, "exp_avg_sq": second}
    theirs = {"state": {0: stored}, "param_groups": [{"params": [0], "lr": LR}]}
    made = convert.adam_state_dict(theirs, lambda number, state, group: state)
    due = second.clone()
    due[PLACE] = float(first[PLACE]) ** 2
    torch.testing.assert_close(made["state"][0]["exp_avg_sq"], due, rtol=1e-6, atol=0)
    assert second[PLACE] == 0  # what was given is left as it is
    found = decoded(loaded(("int8(units=update)", "fp32"), first, second))
    torch.testing.assert_close(found["exp_avg_sq"], due, rtol=2e-3, atol=0)
