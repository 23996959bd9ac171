"""What the moments carry over many steps, against exact running means in float64."""

import math

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs import decode_state
from turboadam import TurboAdam

B1, B2, NUMEL = 0.9, 0.999, 4096
# of a carried first moment, as the docs state them: its relative root mean square error at most,
# and its cosine with the exact one at least
CARRIED = {1: (0.85, 0.55), 2: (1.35, 0.55), 3: (0.9, 0.75), 4: (0.35, 0.95), 6: (0.08, 0.99)}


def gradients(steps: int):
    noise = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield torch.randn(NUMEL, generator=noise)


def running_mean(steps: int) -> torch.Tensor:
    mean = torch.zeros(NUMEL, dtype=torch.float64)
    for grad in gradients(steps):
        mean = B1 * mean + (1 - B1) * grad
    return mean


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(found.double() @ expected / found.double().norm() / expected.norm())


@pytest.mark.parametrize("m_bits", CARRIED)
def test_first_moment_is_a_running_mean(m_bits: int) -> None:
    """Of gradients that say nothing of each other, so that no new one stands for an old one."""
    param = Parameter(torch.zeros(NUMEL))
    optimizer = TurboAdam([param], betas=(B1, B2), m_bits=m_bits, mode="adamw", compress_v=False)
    for grad in gradients(100):
        param.grad = grad
        optimizer.step()
    found, expected = decode_state(optimizer, param)["exp_avg"], running_mean(100)
    most, least = CARRIED[m_bits]
    assert error(found, expected) < most
    assert cosine(found, expected) > least


def test_costate_as_first_written_has_no_momentum() -> None:
    """It keeps m as a part along the gradient and what is left over, and reads it with the next.

    What is left over then never begins: a first moment of 0 has none, and a gradient plus a
    multiple of itself has none. This test is why the one above exists.
    """
    along, rest = 0.0, torch.zeros(NUMEL, dtype=torch.float64)
    for step, grad in enumerate(map(torch.Tensor.double, gradients(100)), start=1):
        read = (
            along * grad + rest.sign() * rest.abs().mean()
        )  # the new gradient in place of the old
        mean = B1 * read + (1 - B1) * grad
        along = float(mean @ grad / grad.square().sum())
        rest = mean - along * grad
        rest = torch.where(rest.abs() > 1e-6 * mean.abs(), rest, 0.0)
        torch.testing.assert_close(mean, (1 - B1**step) * grad, rtol=1e-5, atol=1e-7)
    assert error(mean.float(), running_mean(100)) > 4
    assert cosine(mean.float(), running_mean(100)) < 0.45


@pytest.mark.parametrize("v_bits", [3, 4, 6, 8])
def test_second_moment_neither_grows_nor_shrinks(v_bits: int) -> None:
    """Steps divide by its root, so what must not drift over 3,000 of them is the mean of 1 / root.

    An offset of half a level each time that it is written makes v a thousand times too large.
    """
    param = Parameter(torch.zeros(NUMEL))
    optimizer = TurboAdam([param], betas=(B1, B2), v_bits=v_bits, compress_m=False)
    exact = torch.zeros(NUMEL, dtype=torch.float64)
    apart = []
    for step, grad in enumerate(gradients(3000)):
        param.grad = grad
        optimizer.step()
        exact = B2 * exact + (1 - B2) * grad.double() ** 2
        if step >= 2500 and step % 50 == 0:
            found = decode_state(optimizer, param)["exp_avg_sq"].double()
            apart.append(float((exact / found).sqrt().mean().log()))
    assert abs(math.fsum(apart) / len(apart)) < 0.05
    # and no element by itself has gone astray
    assert float((found / exact).log().abs().max()) < math.log(64)


def test_rows_without_gradients_stay_bitwise_still() -> None:
    """Beside rows that have them, in one block, at every width of codes."""
    for m_bits, v_bits in ((1, 2), (2, 3), (3, 4), (4, 6), (6, 8)):
        param = Parameter(torch.randn(256, 48, generator=torch.Generator().manual_seed(1)))
        start = param.detach().clone()
        still = torch.arange(256) % 3 == 0
        optimizer = TurboAdam([param], lr=0.1, m_bits=m_bits, v_bits=v_bits)
        noise = torch.Generator().manual_seed(0)
        for _ in range(30):
            param.grad = torch.randn(256, 48, generator=noise).masked_fill(still[:, None], 0)
            optimizer.step()
        assert torch.equal(param[still], start[still])
        assert (param[~still] != start[~still]).all()
