"""Torch's default dtype and device change no number; what is right comes from exact arithmetic."""

import pytest
import torch
from micro_batches import a_param, give
from torch.nn import Parameter

from optstate_codecs import decode_state
from optstate_codecs.tables import forget_tables
from optstate_codecs.testing import DEFAULTS, torch_defaults
from stochbf16 import Adam, AdamW, StochasticAccumulator, stochastic_round, stochastic_round_

EACH = pytest.mark.parametrize(
    ("dtype", "device"), DEFAULTS, ids=lambda v: str(v).removeprefix("torch.")
)


@EACH
@pytest.mark.parametrize("make", [Adam, AdamW])
def test_moments_are_those_of_exact_adam(make, dtype, device) -> None:
    """4,096 elements after 300 steps, against ``torch.optim.Adam`` in float64."""
    exact = Parameter(torch.zeros(4, 1024, dtype=torch.float64))
    param = a_param(4, 1024)
    reference = torch.optim.Adam([exact], lr=1e-3)
    with torch_defaults(dtype, device):
        optimizer = make([param], lr=1e-3)
    noise = torch.Generator().manual_seed(0)
    for _ in range(300):
        param.grad = torch.randn(4, 1024, generator=noise).add_(0.3).bfloat16()
        exact.grad = param.grad.double()
        reference.step()
        with torch_defaults(dtype, device):
            optimizer.step()
    with torch_defaults(dtype, device):
        found = decode_state(optimizer, param)
    theirs = reference.state[exact]
    for ours, right in (("ema", "exp_avg"), ("ema_squared", "exp_avg_sq")):
        ratio = found[ours].double().mean() / theirs[right].mean()
        assert float(ratio) == pytest.approx(1, abs=0.02)
    moved = param.detach().double().sum() / exact.detach().sum()
    assert float(moved) == pytest.approx(1, abs=0.02)
    assert float(found["step"]) == 300


def accumulated() -> torch.Tensor:
    params = a_param(500), a_param(3, 7)
    with StochasticAccumulator(params):
        for value in [1.0] + 100 * [0.003]:
            give(*((param, torch.full_like(param, value)) for param in params))
    return torch.cat([param.grad.flatten() for param in params])


@EACH
def test_accumulators(dtype, device) -> None:
    forget_tables()
    with torch_defaults(dtype, device):
        total = accumulated()
    assert torch.equal(total, accumulated())
    # rounded to nearest, it would stay at 1
    assert float(total.double().mean()) == pytest.approx(1.3, rel=0.01)


@EACH
def test_rounding(dtype, device) -> None:
    source = torch.full((4000,), 1 + 2.0**-10)

    def rounded() -> list[torch.Tensor]:
        generators = [torch.Generator().manual_seed(7) for _ in range(2)]
        target = torch.empty_like(source, dtype=torch.bfloat16)
        stochastic_round_(target, source, generator=generators[0])
        return [target, stochastic_round(source, generator=generators[1])]

    forget_tables()
    with torch_defaults(dtype, device):
        found = rounded()
    assert all(map(torch.equal, found, rounded()))
    assert float(found[0].double().mean()) == pytest.approx(1 + 2.0**-10, abs=2e-4)
