"""RMSProp, Compass and LPFAdamW against their formulas in float64."""

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs import CodedOptimizer, decode_state
from optstate_codecs.rules import Compass, LPFAdamW, RMSProp
from optstate_codecs.testing import assert_close

EXACT = {"ema": "fp32", "ema_squared": "fp32", "smoothing": "fp32"}
BF16 = dict.fromkeys(EXACT, "bf16")
RULES = [RMSProp(), Compass(), LPFAdamW()]
NAMES = [rule.name for rule in RULES]


def mean(values, beta):
    """The running mean of a history, as a weighted sum."""
    last = len(values) - 1
    return sum(beta ** (last - i) * (1 - beta) * value for i, value in enumerate(values))


def directions(name, grads, betas, amplify):
    """Each step's numerator and second moment, bias corrected."""
    amplified = []
    for t, grad in enumerate(grads, 1):
        slope = grad if name == "rmsprop" else grad + amplify * mean(grads[:t], betas[0])
        amplified.append(slope)
        squares = mean([a**2 for a in amplified], betas[-1])
        above = mean(amplified, betas[1]) if name == "lpf_adamw" else slope
        correct = {"rmsprop": 0.0, "compass": betas[0], "lpf_adamw": betas[-2:][0]}[name]
        yield above / (1 - correct**t), squares / (1 - betas[-1] ** t)


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_against_the_closed_form(rule, maximize: bool, far: bool) -> None:
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(400, generator=noise)
    grads = [torch.randn(400, generator=noise) for _ in range(15)]
    betas = {"rmsprop": (0.97,), "compass": (0.8, 0.97), "lpf_adamw": (0.8, 0.7, 0.97)}[rule.name]
    if far:
        betas = (*(0.4 for _ in betas[1:]), betas[-1])
    options = {"lr": 0.03, "eps": 1e-4, "weight_decay": 0.2, "maximize": maximize}
    options |= {"beta": betas[0]} if rule.name == "rmsprop" else {"betas": betas, "amp_fac": 3.0}
    param, due = Parameter(start.clone()), start.double()
    optimizer = CodedOptimizer([param], rule, EXACT, **options)
    signed = [(-grad if maximize else grad).double() for grad in grads]
    for grad, (above, squares) in zip(
        grads, directions(rule.name, signed, betas, 3.0), strict=True
    ):
        param.grad = grad
        optimizer.step()
        due = due * (1 - 0.03 * 0.2) - 0.03 * above / (squares.sqrt() + 1e-4)
    assert_close("parameter", due - start, param.detach() - start, 1e-5)
    stored = decode_state(optimizer, param)
    assert set(stored) == {"step", *(m.name for m in rule.moments(None))}
    assert_close("ema_squared", squares * (1 - betas[-1] ** 15), stored["ema_squared"], 1e-5)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_scalars_may_be_tensors(rule) -> None:
    """As where step counts lie on a device, and in compiled loops: nothing reads them."""
    hyper = rule.hyper(rule.defaults())
    for step in (1.0, 7.0):
        numbers = rule.scalars(hyper, step)
        tensors = [torch.as_tensor(x) for x in rule.scalars(hyper, torch.tensor(step))]
        assert [float(x) for x in tensors] == pytest.approx(numbers, rel=1e-4)
        got = []
        for scalars in (numbers, [torch.tensor(x) for x in numbers]):
            param, moments = torch.ones(9), {name: torch.ones(9) for name in EXACT}
            rule.apply(param, torch.linspace(-2, 1, 9), moments, scalars, rule.variant(hyper))
            got.append({"param": param, **moments})
        torch.testing.assert_close(*got)


@pytest.mark.parametrize(
    ("rule", "options", "error", "words"),
    [
        (RMSProp(), {"beta": 1.0}, ValueError, r"beta=1.0: must be in \[0, 1\)"),
        (RMSProp(), {"betas": (0.9, 0.9)}, TypeError, "betas: unknown argument"),
        (Compass(), {"amp_fac": -1}, ValueError, "amp_fac=-1: must be finite and at least 0"),
        (Compass(), {"betas": (0.9, 0.9, 0.9)}, ValueError, "must be two numbers"),
        (LPFAdamW(), {"betas": (0.9, 0.9)}, ValueError, "must be three numbers"),
        (LPFAdamW(), {"eps": "x"}, TypeError, "eps='x': must be a number"),
    ],
)
def test_bad_arguments(rule, options, error, words) -> None:
    with pytest.raises(error, match=words):
        CodedOptimizer([Parameter(torch.ones(3))], rule, EXACT, **options)
