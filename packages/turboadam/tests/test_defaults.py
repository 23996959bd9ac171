"""Torch's default dtype and device change no number; what is right comes from exact arithmetic."""

from functools import partial

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs import decode_state
from optstate_codecs.testing import DEFAULTS, tensors_in, torch_defaults
from optstate_codecs.testing.subject import assert_same
from turboadam import TurboAdam, from_turboadam

MAKES = {
    "feedback": TurboAdam,
    "adamw": partial(TurboAdam, mode="adamw"),
    "3 and 4": partial(TurboAdam, mode="adamw", m_bits=3, v_bits=4),
    "6 and 8": partial(TurboAdam, m_bits=6, v_bits=8, error_feedback=True),
}
EACH = pytest.mark.parametrize(
    ("dtype", "device"), DEFAULTS, ids=lambda v: str(v).removeprefix("torch.")
)


@EACH
@pytest.mark.parametrize("name", MAKES)
def test_moments_are_those_of_exact_adam(name, dtype, device) -> None:
    """4,096 elements after 300 steps, against ``torch.optim.AdamW`` in float64."""
    exact, param = Parameter(torch.zeros(4096, dtype=torch.float64)), Parameter(torch.zeros(4096))
    reference = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0)
    with torch_defaults(dtype, device):
        optimizer = MAKES[name]([param], lr=1e-3)
    noise = torch.Generator().manual_seed(0)
    for _ in range(300):
        param.grad = torch.randn(4096, generator=noise) + 0.3
        exact.grad = param.grad.double()
        reference.step()
        with torch_defaults(dtype, device):
            optimizer.step()
    with torch_defaults(dtype, device):
        found = decode_state(optimizer, param)
    theirs = reference.state[exact]
    # what steps are multiplied with
    inverse = found["exp_avg_sq"].double().rsqrt().mean(), theirs["exp_avg_sq"].rsqrt().mean()
    means = found["exp_avg"].double().mean(), theirs["exp_avg"].mean()
    moved = param.detach().double().sum(), exact.detach().sum()
    # what nearest rounding takes from a stored mean has moved the parameter already
    bounds = 0.07, 0.35 if name == "feedback" else 0.07, 0.07
    for (ours, right), bound in zip((inverse, means, moved), bounds, strict=True):
        assert float(ours / right) == pytest.approx(1, abs=bound)
    assert float(found["step"]) == 300


@EACH
def test_converted_states(dtype, device) -> None:
    """bfloat16 has no step 1001."""
    noise = torch.Generator().manual_seed(0)
    coded = {
        "step": 1001,
        "ustate": {
            "codes": torch.randint(256, (4,), generator=noise, dtype=torch.uint8),
            "means": torch.randn(4, generator=noise).bfloat16(),
            "decode_step": torch.tensor([0.75]),
            "original_numel": 14,
            "mean_block_size": 4,
        },
        "v_state": {
            "indices": torch.randint(256, (6,), generator=noise, dtype=torch.uint8),
            "scales": torch.tensor([[-14.0, -7.0], [-9.0, -3.0]]),
            "n_bits": 3,
            "original_shape": (2, 7),
            "original_length": 14,
        },
    }
    group = {"params": [0], "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    theirs = {"state": {0: coded}, "param_groups": [group]}
    with torch_defaults(dtype, device):
        found = from_turboadam(theirs)
    assert float(found["state"][0]["step"]) == 1001
    assert_same("converted", tensors_in("", from_turboadam(theirs)), tensors_in("", found))
