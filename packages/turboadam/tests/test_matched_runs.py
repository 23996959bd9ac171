"""A network that TurboAdam trains from the same weights on the same batches as torch's AdamW."""

from functools import partial

import pytest
import torch

from optstate_codecs.testing import loss_apart
from turboadam import TurboAdam

coded = partial(TurboAdam, min_m_compress_elements=0, min_v_compress_elements=0)
LR = 2e-3
# how much larger or smaller the logarithm of the held-out loss may be
PAIRS = {
    "feedback": (coded, 0.05),
    "adamw": (partial(coded, mode="adamw"), 0.05),
    "flushed": (partial(coded, mode="adamw", error_feedback=True), 0.05),
    "flushed-1-and-3": (partial(coded, m_bits=1), 0.05),
}


def test_steps_a_tenth_longer_are_told_apart() -> None:
    assert abs(loss_apart(torch.optim.AdamW, torch.optim.AdamW, 1.1 * LR, LR)) > 0.06


@pytest.mark.parametrize(("ours", "bound"), PAIRS.values(), ids=PAIRS)
def test_learns_what_torchs_learns(ours, bound: float) -> None:
    assert abs(loss_apart(ours, torch.optim.AdamW, LR)) < bound
