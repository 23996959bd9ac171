"""Adam's rule against the paper's formula in float64, written another way."""

import pytest
import torch

from optstate_codecs.rules import Adam


def oracle(p, grads, lr, betas, eps, decay, decoupled, amsgrad):
    """Closed form: moments as weighted sums over the gradient history."""
    history, largest = [], torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        if decoupled:
            p = p - lr * decay * p
        else:
            g = g + decay * p
        history.append(g)
        m = sum(betas[0] ** (t - i) * (1 - betas[0]) * g for i, g in enumerate(history, 1))
        v = sum(betas[1] ** (t - i) * (1 - betas[1]) * g**2 for i, g in enumerate(history, 1))
        largest = torch.max(largest, v)
        second = (largest if amsgrad else v) / (1 - betas[1] ** t)
        p = p - lr * m / (1 - betas[0] ** t) / (torch.sqrt(second) + eps)
    return p


@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_against_the_closed_form(decoupled: bool, amsgrad: bool, tensors: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator, dtype=torch.float64)
    grads = [torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(12)]
    options = {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-4, "weight_decay": 0.2}
    expected = oracle(start, grads, 0.03, (0.8, 0.97), 1e-4, 0.2, decoupled, amsgrad)

    group = {**options, "amsgrad": amsgrad, "maximize": False}
    if tensors:
        group["lr"] = torch.tensor(0.03, dtype=torch.float64)
        group["betas"] = tuple(torch.tensor(b, dtype=torch.float64) for b in group["betas"])
    rule = Adam(decoupled=decoupled)
    hyper = rule.hyper(group)
    param = start.clone()
    moments = {m.name: torch.zeros_like(start) for m in rule.moments(hyper)}
    for t, grad in enumerate(grads, 1):
        kept = grad.clone()
        rule.apply(param, grad, moments, rule.scalars(hyper, float(t)), rule.variant(hyper))
        assert torch.equal(grad, kept)
    torch.testing.assert_close(param, expected, rtol=1e-11, atol=1e-12)
    assert ("max_exp_avg_sq" in moments) == amsgrad


def test_step_as_a_tensor_is_the_same() -> None:
    rule = Adam()
    hyper = rule.hyper(rule.defaults())
    grad = torch.randn(40, generator=torch.Generator().manual_seed(0))
    results = []
    for step in (3.0, torch.tensor(3.0)):
        param = torch.ones(40)
        moments = {m.name: torch.full((40,), 0.1) for m in rule.moments(hyper)}
        rule.apply(param, grad, moments, rule.scalars(hyper, step), rule.variant(hyper))
        results.append(param)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
