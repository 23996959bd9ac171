"""A network that each optimizer trains from the same weights on the same batches as torch's."""

import math
from functools import cache
from statistics import mean

import pytest
import torch
from torch import nn

from lowbit_adam import Adam4bit, Adam8bit, AdamFp8, AdamW4bit, AdamW8bit, AdamWFp8

PAIRS = [
    (Adam8bit, torch.optim.Adam, 0.01),
    (AdamFp8, torch.optim.Adam, 0.015),
    (Adam4bit, torch.optim.Adam, 0.025),
    (AdamW8bit, torch.optim.AdamW, 0.01),
    (AdamWFp8, torch.optim.AdamW, 0.015),
    (AdamW4bit, torch.optim.AdamW, 0.025),
]
LR = 2e-3


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


def apart(ours, theirs, lr: float = LR) -> float:
    """How much larger the held-out loss of one is than that of the other, mean of three seeds."""
    return mean(
        math.log(held_out_loss(ours, seed, lr) / held_out_loss(theirs, seed)) for seed in range(3)
    )


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_steps_a_twentieth_longer_are_told_apart(optimizer_class) -> None:
    assert abs(apart(optimizer_class, optimizer_class, 1.05 * LR)) > 0.03


@pytest.mark.parametrize(("ours", "theirs", "bound"), PAIRS)
def test_learns_what_torchs_learns(ours, theirs, bound: float) -> None:
    assert abs(apart(ours, theirs)) < bound
