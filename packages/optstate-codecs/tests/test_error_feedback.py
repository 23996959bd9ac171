"""Delivering what storing a first moment leaves out: its formula, and what it adds up to."""

from functools import partial

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer, decode_state
from optstate_codecs.rules import SGD

FORMATS = {
    "eight bits, values": "int8(block_size=64)",
    "four bits": "costate(bits=4)",
    "two bits": "costate(bits=2)",
    "one bit": "costate(bits=1)",
    "two bits, normal levels": "costate(bits=2, block_size=64, levels=normal)",
}


def stepped(feedback: bool, first: str, grads, second: str = "fp32", *, rule=Adam, **options):
    """The parameter's changes, [steps, elements], and the optimizer."""
    formats = {"exp_avg": first, "exp_avg_sq": second, "max_exp_avg_sq": second}
    param = Parameter(torch.zeros_like(grads[0]))
    options = {"lr": 1.0, "weight_decay": 0.0, **options}
    optimizer = CodedOptimizer([param], rule(error_feedback=feedback), formats, **options)
    moved = []
    for grad in grads:
        param.detach().zero_()
        param.grad = grad.clone()
        optimizer.step()
        moved.append(param.detach().clone())
    return torch.stack(moved), optimizer


def gradients(steps: int, numel: int = 512) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(numel, generator=noise) for _ in range(steps)]


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "ascend"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_step_against_its_formula(name: str, maximize: bool, amsgrad: bool) -> None:
    """In float64, from the moments as they were stored before and after each step."""
    grads, beta1, beta2, eps = gradients(12), 0.8, 0.9, 1e-3
    options = {"betas": (beta1, beta2), "eps": eps, "amsgrad": amsgrad, "maximize": maximize}
    before = largest = v = torch.zeros(512, dtype=torch.float64)
    for t in range(1, 13):
        moved, optimizer = stepped(True, FORMATS[name], grads[:t], **options)
        grad = -grads[t - 1].double() if maximize else grads[t - 1].double()
        v = beta2 * v + (1 - beta2) * grad**2
        largest = torch.maximum(largest, v)
        m = beta1 * before + (1 - beta1) * grad
        (param,) = optimizer.param_groups[0]["params"]
        after = decode_state(optimizer, param)["exp_avg"].double()
        length = m / (1 - beta1**t) + beta1 / (1 - beta1) * (m - after)
        divisor = ((largest if amsgrad else v) / (1 - beta2**t)).sqrt() + eps
        torch.testing.assert_close(moved[-1].double(), -length / divisor, rtol=1e-4, atol=1e-5)
        before = after


@pytest.mark.parametrize("name", FORMATS)
def test_updates_add_up_to_exact_adams(name: str) -> None:
    """Without it they part as a random walk does; with it no farther than a few steps go.

    What is stored in the end differs still, and the roots that divide change from step to step.
    """
    grads = gradients(2000)
    beta1, beta2 = 0.9, 0.999
    m = v = due = torch.zeros(512, dtype=torch.float64)
    for t, grad in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * grad.double()
        v = beta2 * v + (1 - beta2) * grad.double() ** 2
        due = due - m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
    apart = {
        feedback: (stepped(feedback, FORMATS[name], grads)[0].double().sum(0) - due).square().mean()
        for feedback in (False, True)
    }
    assert apart[True].sqrt() < 0.2 * apart[False].sqrt()


@pytest.mark.parametrize("rule", [Adam, partial(Adam, decoupled=True)], ids=["adam", "adamw"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_nothing_is_left_out_of_exact_moments(rule, amsgrad: bool) -> None:
    options = {"rule": rule, "amsgrad": amsgrad, "weight_decay": 0.1, "lr": 1e-2}
    with_it, without = (
        stepped(flag, "fp32", gradients(20), **options)[0] for flag in (True, False)
    )
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("name", FORMATS)
def test_a_moment_that_is_not_carried_owes_nothing(name: str) -> None:
    options = {"betas": (0.0, 0.99), "second": "oneq(bits=3)"}
    with_it, without = (
        stepped(f, FORMATS[name], gradients(20), **options)[0] for f in (True, False)
    )
    assert torch.equal(with_it, without)


SGD_FORMATS = {
    "eight bits": "int8(block_size=64)",
    "four bits": "int4(block_size=64)",
    "four bits, stochastic": "int4(block_size=64, rounding=stochastic)",
}


def sgd_moved(feedback: bool, first: str, grads, **options) -> tuple[torch.Tensor, CodedOptimizer]:
    """The parameter after steps of SGD, and the optimizer."""
    param = Parameter(torch.zeros_like(grads[0]))
    rule, options = SGD(error_feedback=feedback), {"lr": 0.1, "momentum": 0.9, **options}
    optimizer = CodedOptimizer([param], rule, {"momentum_buffer": first}, **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach().double(), optimizer


@pytest.mark.parametrize("nesterov", [False, True], ids=["polyak", "nesterov"])
@pytest.mark.parametrize("name", SGD_FORMATS)
def test_impulses_of_sgd_add_up_to_exact_momentums(name: str, nesterov: bool) -> None:
    """After 200 steps without gradients: lr / (1 - mu) times the sum of the 40 before.

    That is the geometric series of exact momentum, whatever was stored in between.
    """
    grads = gradients(40) + 200 * [torch.zeros(512)]
    due = -0.1 / (1 - 0.9) * torch.stack(grads).double().sum(0)
    exact = Parameter(torch.zeros(512, dtype=torch.float64))
    reference = torch.optim.SGD([exact], lr=0.1, momentum=0.9, nesterov=nesterov)
    for grad in grads:
        exact.grad = grad.double()
        reference.step()
    torch.testing.assert_close(exact.detach(), due, rtol=1e-7, atol=1e-7)
    found = {
        flag: (sgd_moved(flag, SGD_FORMATS[name], grads, nesterov=nesterov)[0] - due).norm()
        for flag in (False, True)
    }
    assert found[True] < 1e-4 * due.norm()
    assert found[False] > 10 * found[True]


def test_sgd_without_momentum_and_in_float32_steps_as_without_it() -> None:
    for first, options in (("int4(block_size=64)", {"momentum": 0.0}), ("fp32", {})):
        with_it, without = (sgd_moved(f, first, gradients(5), **options)[0] for f in (True, False))
        assert torch.equal(with_it, without)


def test_sgd_needs_a_momentum_below_one() -> None:
    with pytest.raises(ValueError, match=r"momentum=1\.0: must be below 1 with error_feedback"):
        sgd_moved(True, "int8", gradients(1), momentum=1.0)
    sgd_moved(False, "int8", gradients(1), momentum=1.0)


@pytest.mark.parametrize("first", [f for name, f in FORMATS.items() if "values" not in name])
def test_a_parameter_without_gradients_stays_exactly_zero(first: str) -> None:
    """A code without a level for zero has an error in update units, but not in the moment."""
    grads = [grad.index_fill(0, torch.arange(0, 512, 3), 0.0) for grad in gradients(5)]
    moved, _ = stepped(True, first, grads, "oneq(bits=3, block_size=64)")
    assert not moved[:, ::3].any()
    assert moved[:, 1::3].all()


@pytest.mark.parametrize("first", ["costate(bits=4)", "costate(bits=1)"])
def test_loops_give_the_same_bits(first: str) -> None:
    eager, ours = (
        stepped(True, first, gradients(5), "oneq(bits=4)", backend=backend)
        for backend in ("eager", "compile")
    )
    assert torch.equal(eager[0], ours[0])
    param_steps = ours[1].stored_param_steps()
    assert ours[1].executor.compiled.stepped_by_kernels(param_steps) == [True]


def test_the_flag_is_one() -> None:
    assert not Adam().has_error_feedback
    assert Adam(error_feedback=True).has_error_feedback
    assert Adam() != Adam(error_feedback=True)
