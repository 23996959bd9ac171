"""Trains a new model with one optimizer, on text in an order that only the seed decides."""

import math
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from optstate.demo.data import Corpus, cut, training_batches, validation_batches
from optstate.demo.memory import PeakMeter, measure
from optstate.demo.model import ByteGPT
from optstate.demo.record import Run
from optstate.demo.settings import Settings

WARMUP = 0.1
"""Share of the steps over which the learning rate rises."""
FLOOR = 0.05
"""Learning rate at the last step, as a share of the peak."""


def schedule(steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to `FLOOR`: a function from steps done to a share of lr."""
    warmup = max(1, round(steps * WARMUP))

    def share(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        progress = (done - warmup) / max(1, steps - warmup)
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return share


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """The numbers of steps after which to validate; always includes `steps`."""
    return {math.ceil(steps * i / evaluations) for i in range(1, evaluations + 1)}


def build_model(settings: Settings) -> ByteGPT:
    """A model with weights from the seed; torch's global generator does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = ByteGPT(settings.width, settings.depth, settings.context)
    return model.to(settings.device)


def train(
    name: str,
    optimizer_class: Callable[..., torch.optim.Optimizer],
    corpus: Corpus,
    settings: Settings,
    on_step: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Trains one model.

    Args:
        name: The name of the run in the report.
        optimizer_class: Called as ``optimizer_class(params, lr=...)``.
        corpus: The text.
        settings: Sizes, steps, seed and device.
        on_step: Called after every step with the run so far.

    Returns:
        The finished run. Two runs with equal arguments have equal losses on a CPU.
    """
    device = torch.device(settings.device)
    meter = PeakMeter(device)
    model = build_model(settings)
    optimizer = optimizer_class(model.parameters(), lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(settings.steps))
    run = Run(name, parameters=sum(p.numel() for p in model.parameters()))
    validate_after = evaluation_steps(settings.steps, settings.evaluations)

    for done, starts in enumerate(training_batches(corpus, settings), start=1):
        begin = perf_counter()
        loss = model.loss(cut(corpus.train, starts, settings.context).to(device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        run.train.append(loss.item())
        update_begin = perf_counter()
        optimizer.step()
        _wait_for(device)
        run.update_ms.append(1e3 * (perf_counter() - update_begin))
        scheduler.step()
        run.step_ms.append(1e3 * (perf_counter() - begin))
        meter.sample()
        if done in validate_after:
            run.validation.append((done, validate(model, corpus, settings)))
        on_step(run)

    run.memory = measure(model, optimizer, meter)
    return run


def _wait_for(device: torch.device) -> None:
    """Waits until a GPU's queue is empty, so that a clock shows its time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def validate(model: ByteGPT, corpus: Corpus, settings: Settings) -> float:
    """Mean loss on the same held-out sequences every time, nats a byte."""
    losses: list[Tensor] = [
        model.loss(cut(corpus.validation, starts, settings.context).to(settings.device))
        for starts in validation_batches(corpus, settings)
    ]
    return torch.stack(losses).mean().item()
