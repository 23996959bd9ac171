"""Compares the loss that a small network reaches with one optimizer and with another."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from statistics import mean

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["loss_apart"]

Make = Callable[..., Optimizer]

linear = partial(nn.Linear, dtype=torch.float32, device="cpu")


def loss_apart(
    ours: Make,
    theirs: Make,
    lr: float,
    their_lr: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> float:
    """The logarithm of the ratio of held-out losses, of our optimizer to another.

    A small student learns a teacher's outputs for random inputs, with both optimizers from the same
    weights and on the same batches; the mean of three seeds. Results are cached.

    Args:
        ours: makes an optimizer from parameters, ``lr`` and ``weight_decay``.
        theirs: makes the other optimizer likewise.
        lr: the learning rate.
        their_lr: of the other optimizer; None: ``lr``.
        dtype: of the student that ``ours`` trains; the other student is float32.

    Examples:
        >>> assert abs(loss_apart(AdamW8bit, torch.optim.AdamW, lr=2e-3)) < 0.01
    """
    other = lr if their_lr is None else their_lr
    return mean(
        math.log(
            _held_out_loss(ours, seed, lr, dtype)
            / _held_out_loss(theirs, seed, other, torch.float32)
        )
        for seed in range(3)
    )


@cache
def _held_out_loss(make: Make, seed: int, lr: float, dtype: torch.dtype) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = nn.Sequential(linear(32, 32), nn.Tanh(), linear(32, 8))
        student = nn.Sequential(linear(32, 128), nn.GELU(), linear(128, 8))
        questions = torch.randn(101, 64, 32, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        answers = teacher(questions)
    student.to(dtype)
    optimizer = make(student.parameters(), lr=lr, weight_decay=1e-4)
    for batch in range(100):
        loss = (student(questions[batch].to(dtype)) - answers[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        # in float32, so that only the learned weights differ
        return float((student.float()(questions[-1]) - answers[-1]).square().mean())
