"""An optimizer, and backwards with given gradients, for the tests of gradient release."""

import torch
from subjects import FIRST, SECOND

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.testing import Trainer

CODED = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
#: bytes: every parameter alone, some together, all together
BUCKETS = [0, 3000, 1 << 30]


def make(params, formats=CODED, **options):
    return CodedOptimizer(params, Adam(decoupled=True), formats, lr=1e-2, **options)


def backward(trainer: Trainer) -> None:
    """A backward whose gradients are those that the trainer gives, bit by bit."""
    pairs = [(p, trainer.gradient(i)) for i, p in enumerate(trainer.params) if p.requires_grad]
    sum((p * grad).sum() for p, grad in pairs if grad is not None).backward()


def run(trainer: Trainer, steps: int, *, zero: bool = True) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        backward(trainer)
        trainer.optimizer.step()
        if zero:
            trainer.optimizer.zero_grad()
        trainer.time += 1
    return trainer.tensors()


def counts(trainer: Trainer) -> list[int]:
    """How many steps each parameter has taken."""
    return [int(trainer.optimizer.state.get(p, {}).get("step", 0)) for p in trainer.params]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
