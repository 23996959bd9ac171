"""The fidelity lab's gradients that are sparse by rows: how often rows of 64 get one."""

import torch

from optstate_codecs.testing import gradients


def given(kind: str, steps: int) -> torch.Tensor:
    """Whether each of 16 rows got a gradient, [steps, rows]; never a part of one."""
    grads = torch.stack(list(gradients([kind], steps, 16 * 64))).view(steps, 16, 64)
    nonzero = grads != 0
    assert torch.equal(nonzero.all(2), nonzero.any(2))
    return nonzero.any(2)


def test_row_n_gets_every_nth_gradient_in_the_mean() -> None:
    share = given("Zipf rows", 2000).double().mean(0)
    expected = 1 / torch.arange(1, 17, dtype=torch.float64)
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 2000).sqrt()).all()


def test_every_other_row_wakes_after_a_thousand_steps() -> None:
    found = given("waking rows", 1002)
    assert found[:, ::2].all()
    assert not found[:1000, 1::2].any()
    assert found[1000:, 1::2].all()
