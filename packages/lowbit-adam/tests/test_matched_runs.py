"""A network that each optimizer trains from the same weights on the same batches as torch's."""

import pytest
import torch

from lowbit_adam import Adam4bit, Adam8bit, AdamFp8, AdamW4bit, AdamW8bit, AdamWFp8
from optstate_codecs.testing import loss_apart

PAIRS = [
    (Adam8bit, torch.optim.Adam, 0.01),
    (AdamFp8, torch.optim.Adam, 0.015),
    (Adam4bit, torch.optim.Adam, 0.025),
    (AdamW8bit, torch.optim.AdamW, 0.01),
    (AdamWFp8, torch.optim.AdamW, 0.015),
    (AdamW4bit, torch.optim.AdamW, 0.025),
]
LR = 2e-3


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_steps_a_twentieth_longer_are_told_apart(optimizer_class) -> None:
    assert abs(loss_apart(optimizer_class, optimizer_class, 1.05 * LR, LR)) > 0.03


@pytest.mark.parametrize(("ours", "theirs", "bound"), PAIRS)
def test_learns_what_torchs_learns(ours, theirs, bound: float) -> None:
    assert abs(loss_apart(ours, theirs, LR)) < bound
