"""SGD and Lion against torch and float64."""

from functools import partial

import pytest
import torch
from subjects import SGD_VARIANTS
from torch.nn import Parameter

from optstate_codecs import CodedOptimizer, decode_state
from optstate_codecs.rules import SGD, Lion
from optstate_codecs.testing import Trainer, assert_close

MOMENTA = {"momentum_buffer": "fp32", "exp_avg": "fp32"}
sgd = partial(CodedOptimizer, rule=SGD(), formats=MOMENTA)
lion = partial(CodedOptimizer, rule=Lion(), formats=MOMENTA)


def lion_exact(params, grads, lr, betas, decay, sign):
    """Chen et al., algorithm 2, in float64."""
    params = [param.double() for param in params]
    means = [torch.zeros_like(param) for param in params]
    for step in grads:
        for param, mean, grad in zip(params, means, step, strict=True):
            slope = sign * grad.double()
            along = (betas[0] * mean + (1 - betas[0]) * slope).sign()
            param.copy_(param - lr * (along + decay * param))
            mean.copy_(betas[1] * mean + (1 - betas[1]) * slope)
    return params, means


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.4, 0.3)])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lion_is_the_papers(betas, decay: float, maximize: bool) -> None:
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(50, 70, generator=noise)
    grads = [[torch.randn(50, 70, generator=noise)] for _ in range(30)]
    param = Parameter(start.clone())
    options = {"lr": 1e-2, "betas": betas, "weight_decay": decay, "maximize": maximize}
    optimizer = lion([param], **options)
    for (grad,) in grads:
        param.grad = grad
        optimizer.step()
    (due,), (mean,) = lion_exact([start], grads, 1e-2, betas, decay, -1 if maximize else 1)
    assert_close("parameter", due - start, param.detach() - start, 1e-5)
    assert_close("exp_avg", mean, decode_state(optimizer, param)["exp_avg"], 1e-6)


def test_sgd_decay_may_be_decoupled() -> None:
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(300, generator=noise)
    param, due = Parameter(start.clone()), start.double()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    optimizer = CodedOptimizer([param], SGD(decoupled=True), MOMENTA, **options)
    buffer = torch.zeros(300, dtype=torch.float64)
    for _ in range(10):
        param.grad = torch.randn(300, generator=noise)
        optimizer.step()
        buffer = 0.9 * buffer + param.grad.double()
        due = due * (1 - 0.1 * 0.5) - 0.1 * buffer
    assert_close("parameter", due, param.detach(), 1e-6)


@pytest.mark.parametrize("variant", SGD_VARIANTS, ids=str)
def test_sgd_goes_on_from_torchs_checkpoint_and_back(variant) -> None:
    """torch counts no steps: dampening must not be forgotten for another first one."""
    theirs = Trainer(partial(torch.optim.SGD, **variant)).run(3)
    ours = Trainer(partial(sgd, **variant))
    ours.optimizer.load_state_dict(theirs.optimizer.state_dict())
    back = Trainer(partial(torch.optim.SGD, **variant))
    back.optimizer.load_state_dict(ours.optimizer.full_state_dict())
    for trainer in (ours, back):
        trainer.time = theirs.time
        for mine, yours in zip(trainer.params, theirs.params, strict=True):
            mine.data.copy_(yours.data)
        trainer.run(3)
    theirs.run(3)
    for expected, *got in zip(theirs.params, ours.params, back.params, strict=True):
        assert all(torch.equal(expected, param) for param in got)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_may_begin_later(nesterov: bool) -> None:
    sides = [Trainer(make, ((5, 7), (3,))) for make in (torch.optim.SGD, sgd)]
    for side in sides:
        side.run(2)
        side.optimizer.param_groups[0].update(momentum=0.9, nesterov=nesterov)
        side.run(3)
    for expected, got in zip(sides[0].params, sides[1].params, strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("rule", [SGD(), Lion()], ids=["sgd", "lion"])
def test_scalars_may_be_tensors(rule) -> None:
    """As where step counts lie on a device, and in compiled loops: nothing reads them."""
    options = {"momentum": 0.9, "dampening": 0.2} if rule.name == "sgd" else {}
    hyper = rule.hyper({**rule.defaults(), **options})
    for step in (1.0, 2.0, 7.0):
        numbers = rule.scalars(hyper, step)
        tensors = [torch.as_tensor(x) for x in rule.scalars(hyper, torch.tensor(step))]
        assert [float(x) for x in tensors] == pytest.approx(numbers, rel=1e-6)
        got = []
        for scalars in (numbers, tensors):
            param, moments = torch.ones(9), {name: torch.ones(9) for name in MOMENTA}
            rule.apply(param, torch.linspace(-2, 1, 9), moments, scalars, rule.variant(hyper))
            got.append({"param": param, **moments})
        torch.testing.assert_close(*got)


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (sgd, {"momentum": -0.1}, ValueError, "momentum=-0.1: must be finite and at least 0"),
        (sgd, {"dampening": "x"}, TypeError, "dampening='x': must be a number"),
        (sgd, {"nesterov": True}, ValueError, "nesterov=True: must have momentum above 0"),
        (
            sgd,
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            ValueError,
            "nesterov=True: must have momentum above 0 and dampening 0",
        ),
        (sgd, {"betas": (0.9, 0.9)}, TypeError, "betas: unknown argument"),
        (lion, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]=1.0: must be in \[0, 1\)"),
        (lion, {"betas": 0.9}, ValueError, "betas=0.9: must be two numbers"),
        (lion, {"eps": 1e-8}, TypeError, "eps: unknown argument"),
    ],
)
def test_bad_arguments(make, options, error, words) -> None:
    with pytest.raises(error, match=words):
        make([Parameter(torch.ones(3))], **options)
