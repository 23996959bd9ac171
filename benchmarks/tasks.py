"""The tasks of the convergence study, on real data, the same for every optimizer.

`bpe`, `bpe-modern` and `bpe-100m` are language models with a vocabulary of 8,192 on text and code,
whose folder the environment variable CORPUS names (`corpus.py` makes it). `gpt` is a byte GPT of
31.6 million parameters on Shakespeare's plays; `toy-gpt` the same with 0.6 million; `digits` a
convolution on scikit-learn's handwritten digits. A task's data order depends on the seed alone,
its initial weights too.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from language import Language, Shape, sequences
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
        evaluations: how often a run validates, at least.
    """

    model: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    held_out: list[Batch]
    steps: int
    lrs: tuple[float, ...]
    options: dict[str, Any]
    setup: dict[str, Any]
    evaluations: int = 20

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


def bpe(device: torch.device, steps: int | None = None) -> Task:
    """GPT-2's block, 29.6 million parameters; 800 steps are 13.1 of 18.8 million tokens."""
    return _tokens(Shape(512, 8, 256, modern=False), device, steps or 800)


def bpe_modern(device: torch.device, steps: int | None = None) -> Task:
    """Llama's block, as large."""
    return _tokens(Shape(512, 8, 256, modern=True), device, steps or 800)


def bpe_100m(device: torch.device, steps: int | None = None) -> Task:
    """Llama's block, 92 million parameters."""
    return _tokens(Shape(768, 12, 256, modern=True), device, steps or 800)


def _tokens(shape: Shape, device: torch.device, steps: int, batch: int = 64) -> Task:
    folder = Path(os.environ["CORPUS"])
    parts = {name: np.load(folder / f"{name}.npy") for name in ("train", "validation")}
    on_device = {
        name: torch.from_numpy(tokens.astype(np.int32)).to(device) for name, tokens in parts.items()
    }
    window = torch.arange(shape.context + 1, device=device)

    def cut_at(name: str, starts: Tensor) -> Tensor:
        return on_device[name][starts.to(device)[:, None] + window].long()

    def batches(seed: int) -> Iterator[Tensor]:
        # every further epoch has another order
        orders = (
            sequences(parts["train"], batch, shape.context, seed + 1000 * epoch)
            for epoch in range(steps)
        )
        for starts in islice(chain.from_iterable(orders), steps):
            yield cut_at("train", starts)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model.loss(tokens)

    held_out = [
        cut_at("validation", starts)
        for starts in sequences(parts["validation"], batch, shape.context, 0)[:8]
    ]
    kind = "Llama's block" if shape.modern else "GPT-2's block"
    corpus = folder / "corpus.json"
    return Task(
        lambda seed: Language(shape, seed).to(device),
        batches,
        loss,
        held_out,
        steps,
        (1e-3, 1.5e-3),
        {"betas": (0.9, 0.99), "weight_decay": 0.1},
        {
            "model": f"language model, {kind}, width {shape.width}, depth {shape.depth}",
            "batch": batch,
            "context": shape.context,
            "text": json.loads(corpus.read_text()) if corpus.exists() else "unknown",
            "unit": "nats a token",
        },
        evaluations=8,
    )


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


TASKS = {
    "bpe": bpe,
    "bpe-modern": bpe_modern,
    "bpe-100m": bpe_100m,
    "gpt": gpt,
    "toy-gpt": toy_gpt,
    "digits": digits,
}
