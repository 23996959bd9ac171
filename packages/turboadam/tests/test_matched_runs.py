"""A network that TurboAdam trains from the same weights on the same batches as torch's AdamW."""

import math
from functools import cache, partial
from statistics import mean

import pytest
import torch
from torch import nn

from turboadam import TurboAdam

coded = partial(TurboAdam, min_m_compress_elements=0, min_v_compress_elements=0)
LR = 2e-3
# how much larger or smaller the logarithm of the held-out loss may be
PAIRS = {
    "default": (coded, 0.05),
    "flushed": (partial(coded, error_feedback=True), 0.05),
    "flushed-2-and-3": (partial(coded, m_bits=2, v_bits=3, error_feedback=True), 0.05),
    "flushed-1-and-3": (partial(coded, m_bits=1, v_bits=3, error_feedback=True), 0.05),
}


@cache
def held_out_loss(optimizer_class, seed: int, lr: float = LR) -> float:
    """A student learns a teacher's answers to noise; the loss on answers it never saw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
        student = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 8))
        questions = torch.randn(101, 64, 32)
    with torch.no_grad():
        answers = teacher(questions)
    optimizer = optimizer_class(student.parameters(), lr=lr, weight_decay=1e-4)
    for batch in range(100):
        loss = (student(questions[batch]) - answers[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((student(questions[-1]) - answers[-1]).square().mean())


def apart(ours, lr: float = LR) -> float:
    """How much larger the held-out loss is than with torch's AdamW, mean of three seeds."""
    exact = torch.optim.AdamW
    return mean(
        math.log(held_out_loss(ours, seed, lr) / held_out_loss(exact, seed)) for seed in range(3)
    )


def test_steps_a_tenth_longer_are_told_apart() -> None:
    assert abs(apart(torch.optim.AdamW, 1.1 * LR)) > 0.06


@pytest.mark.parametrize(("ours", "bound"), PAIRS.values(), ids=PAIRS)
def test_learns_what_torchs_learns(ours, bound: float) -> None:
    assert abs(apart(ours)) < bound
