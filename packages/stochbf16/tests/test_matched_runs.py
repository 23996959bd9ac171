"""A bfloat16 network learns what the float32 one learns with torch's AdamW."""

from functools import partial

import pytest
import torch

from optstate_codecs.testing import loss_apart
from stochbf16 import AdamW

apart = partial(loss_apart, theirs=torch.optim.AdamW, lr=1e-3, dtype=torch.bfloat16)


def test_rounding_to_nearest_is_told_apart() -> None:
    assert apart(torch.optim.AdamW) > 0.04


@pytest.mark.parametrize(
    "ours", [AdamW, partial(AdamW, master_weight_bits=24)], ids=["stochastic", "24"]
)
def test_learns_what_float32_learns(ours) -> None:
    assert abs(apart(ours)) < 0.01
