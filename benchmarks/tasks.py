"""The tasks of the convergence study: three small ones on real data, the same for every optimizer.

`gpt` is a byte GPT of 31.6 million parameters on Shakespeare's plays, for a GPU; `toy-gpt` the same
with 0.6 million; `digits` a convolution on scikit-learn's handwritten digits. A task's data order
depends on the seed alone, its initial weights too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optstate.demo.data import Corpus, cut, load_documents, training_batches, validation_batches
from optstate.demo.settings import Settings
from optstate.demo.train import build_model

Batch = Any


@dataclass(frozen=True)
class Task:
    """A model, batches to learn and a held-out loss.

    Attributes:
        model: makes the model from a seed.
        batches: the batches of a run, from a seed.
        loss: of a model on a batch.
        held_out: batches that no run learns.
        steps: optimizer steps of a run.
        lrs: the learning rates of the study.
        options: what every Adam is given besides.
        setup: what the result file says about it.
    """

    model: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    held_out: list[Batch]
    steps: int
    lrs: tuple[float, ...]
    options: dict[str, Any]
    setup: dict[str, Any]

    @torch.no_grad()
    def validate(self, model: nn.Module) -> float:
        """The mean loss on what is held out."""
        losses = [self.loss(model, batch) for batch in self.held_out]
        return torch.stack(losses).double().mean().item()

    def compiled(self) -> "Task":
        """The same with its loss through ``torch.compile``, whose code serves every model."""
        setup = {**self.setup, "compiled": True}
        return replace(self, loss=torch.compile(self.loss, dynamic=False), setup=setup)


def gpt(device: torch.device, steps: int | None = None) -> Task:
    """800 steps of 24,576 bytes: about four times through the plays."""
    sizes = Settings(
        steps=steps or 800, batch=64, context=384, width=512, depth=10, validation_batches=32
    )
    return _text(sizes, device, lrs=(5e-4, 1e-3))


def toy_gpt(device: torch.device, steps: int | None = None) -> Task:
    """The demo's model and sizes."""
    return _text(Settings(steps=steps or 300), device, lrs=(1e-3, 2e-3))


def _text(sizes: Settings, device: torch.device, lrs: tuple[float, ...]) -> Task:
    corpus = Corpus.from_documents(load_documents(None), sizes.context)
    held_out = [
        cut(corpus.validation, starts, sizes.context).to(device)
        for starts in validation_batches(corpus, sizes)
    ]

    def model(seed: int) -> nn.Module:
        return build_model(
            Settings(
                width=sizes.width,
                depth=sizes.depth,
                seed=seed,
                context=sizes.context,
                device=str(device),
            )
        )

    def batches(seed: int) -> Iterator[Tensor]:
        order = Settings(steps=sizes.steps, batch=sizes.batch, context=sizes.context, seed=seed)
        for starts in training_batches(corpus, order):
            yield cut(corpus.train, starts, sizes.context).to(device, non_blocking=True)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model.loss(batch)

    return Task(
        model,
        batches,
        loss,
        held_out,
        sizes.steps,
        lrs,
        {"betas": (0.9, 0.999), "weight_decay": 0.1},
        {
            "model": f"byte GPT, width {sizes.width}, depth {sizes.depth}",
            "batch": sizes.batch,
            "context": sizes.context,
            "text": f"Shakespeare's plays, {corpus.train.numel()} bytes",
            "unit": "nats a byte",
        },
    )


def digits(device: torch.device, steps: int | None = None) -> Task:
    """12 epochs of 1,437 pictures of 8 x 8 pixels; the other 360 are held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    pictures = (torch.tensor(data.images, dtype=torch.float32)[order, None] / 16).to(device)
    labels = torch.tensor(data.target)[order].to(device)
    count = steps or 540

    def model(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(1024, 128),
                nn.ReLU(),
                nn.Linear(128, 10),
            ).to(device)

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            chosen = torch.randint(1437, (32,), generator=generator).to(device)
            yield pictures[chosen], labels[chosen]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return Task(
        model,
        batches,
        loss,
        [(pictures[1437:], labels[1437:])],
        count,
        (1e-3, 3e-3),
        {"betas": (0.9, 0.999), "weight_decay": 0.1},
        {
            "model": "two convolutions and two layers",
            "batch": 32,
            "data": "scikit-learn's digits",
            "unit": "nats",
        },
    )


TASKS = {"gpt": gpt, "toy-gpt": toy_gpt, "digits": digits}
