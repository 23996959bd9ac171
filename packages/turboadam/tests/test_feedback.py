"""``error_feedback``: what every gradient moves in the end is what it moves with AdamW."""

import pytest
import torch
from torch.nn import Parameter

from turboadam import TurboAdam

NUMEL = 8192


def moved(optimizer_class, **options) -> torch.Tensor:
    """200 steps of noise with a small constant part, and 60 without, which deliver the rest."""
    noise = torch.Generator().manual_seed(0)
    constant = torch.randn(NUMEL, generator=noise) / 2
    param = Parameter(torch.zeros(NUMEL))
    optimizer = optimizer_class([param], lr=1e-3, weight_decay=0.0, **options)
    for step in range(260):
        grad = torch.randn(NUMEL, generator=noise) + constant
        param.grad = grad * (step < 200)
        optimizer.step()
    return param.detach().double()


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return moved(torch.optim.AdamW)


def apart(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """How much shorter, and how far, relative to how far exact AdamW went."""
    norm = exact.norm()
    return float(1 - found @ exact / norm**2), float((found - exact).norm() / norm)


@pytest.mark.parametrize("m_bits", [1, 2, 3, 4, 6])
def test_all_that_is_lost_is_delivered(m_bits: int, exact: torch.Tensor) -> None:
    options = {"m_bits": m_bits, "compress_v": False, "mode": "adamw"}
    shorter, far = apart(moved(TurboAdam, error_feedback=True, **options), exact)
    # the moment that is stored in the end is larger with coarser levels, and has steps to go
    assert abs(shorter) < {1: 0.02, 2: 0.01}.get(m_bits, 0.005)
    assert far < 0.03
    _, without = apart(moved(TurboAdam, **options), exact)
    assert without > 10 * far


def test_one_bit_without_it_loses_two_fifths(exact: torch.Tensor) -> None:
    """Its scale is that of least squares, which is too short to be unbiased."""
    shorter, _ = apart(moved(TurboAdam, mode="adamw", m_bits=1, compress_v=False), exact)
    assert 0.3 < shorter < 0.5


def test_both_moments_coded_keep_their_length(exact: torch.Tensor) -> None:
    for m_bits, v_bits in ((1, 3), (2, 3), (2, 4), (3, 4)):
        found = moved(TurboAdam, m_bits=m_bits, v_bits=v_bits, error_feedback=True)
        shorter, _ = apart(found, exact)
        assert abs(shorter) < 0.05


def test_nothing_is_delivered_of_what_is_stored_exactly() -> None:
    """Tensors in float32 beside coded ones step as they do without."""
    params = {}
    for feedback in (False, True):
        params[feedback] = [Parameter(torch.ones(5000)), Parameter(torch.ones(4000))]
        optimizer = TurboAdam(params[feedback], error_feedback=feedback)
        for step in range(5):
            for param in params[feedback]:
                generator = torch.Generator().manual_seed(step)
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
    assert torch.equal(params[False][1], params[True][1])
    assert not torch.equal(params[False][0], params[True][0])
