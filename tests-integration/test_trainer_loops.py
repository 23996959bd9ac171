"""Accelerate, Lightning and a container like torchtitan's drive these optimizers as AdamW."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import AdamW, Optimizer, lr_scheduler

from lowbit_adam import AdamW4bit, AdamW8bit
from optstate_codecs import offload
from optstate_wrap import ConfigurablePolicy, WarmupPolicy, wrap
from stochbf16 import AdamW as StochasticAdamW
from turboadam import TurboAdam

STEPS = 8
EXACT = {"formats": {"exp_avg": "fp32", "exp_avg_sq": "fp32"}}
Make = Callable[[Any], Optimizer]

#: with the mathematics and the bits of torch's AdamW
EXACT_OPTIMIZERS: dict[str, Make] = {
    "AdamW8bit": lambda params: AdamW8bit(params, lr=1e-2, **EXACT),
    "TurboAdam": lambda params: TurboAdam(
        params, lr=1e-2, weight_decay=0.01, compress_m=False, compress_v=False
    ),
    "offloaded": lambda params: offload(AdamW8bit(params, lr=1e-2, **EXACT), chunk_bytes=4096),
    "wrapped": lambda params: wrap(AdamW(params, lr=1e-2), ConfigurablePolicy({}), 256),
}
CODED_OPTIMIZERS: dict[str, Make] = {
    "AdamW8bit": lambda params: AdamW8bit(params, lr=1e-2),
    "AdamW4bit": lambda params: AdamW4bit(params, lr=1e-2),
    "TurboAdam": lambda params: TurboAdam(params, lr=1e-2),
    "stochbf16": lambda params: StochasticAdamW(params, lr=1e-2, weight_decay=0.01),
    "offloaded": lambda params: offload(AdamW8bit(params, lr=1e-2), chunk_bytes=4096),
    "wrapped": lambda params: wrap(
        AdamW(params, lr=1e-2), WarmupPolicy(2, min_int8_elements=64), 256
    ),
}
exact = pytest.mark.parametrize("make", EXACT_OPTIMIZERS.values(), ids=EXACT_OPTIMIZERS)
coded = pytest.mark.parametrize("make", CODED_OPTIMIZERS.values(), ids=CODED_OPTIMIZERS)
# State dicts of wrapped optimizers are decoded, so that only exact state is the same afterwards.
RESUMED = {**CODED_OPTIMIZERS, "wrapped": EXACT_OPTIMIZERS["wrapped"]}
resumed = pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED)

pytestmark = pytest.mark.filterwarnings("ignore")


def plain(params: Any) -> Optimizer:
    return AdamW(params, lr=1e-2)


def make_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 1))


def batches(count: int = STEPS) -> list[Tensor]:
    return [torch.randn(16, 7, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def assert_equal_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name


def assert_learned(model: nn.Module, expected: nn.Module) -> None:
    """Nearly the loss of a model that torch's AdamW has trained, much below the first one."""
    x = torch.cat(batches())
    ours, theirs, start = (loss_of(m, x).item() for m in (model, expected, make_model()))
    assert theirs < 0.5 * start
    assert abs(ours - theirs) < 0.02 * start


# Accelerate


class Accelerated:
    """A loop that accumulates two batches for each step, clips, and decays the learning rate."""

    def __init__(self, make: Make) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make_model()
        optimizer = make(model.parameters())
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.97)
        prepared = self.accelerator.prepare(model, optimizer, scheduler)
        self.model, self.optimizer, self.scheduler = prepared

    def train(self, data: list[Tensor]) -> nn.Module:
        for x in data:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, x))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self.accelerator.unwrap_model(self.model)


@exact
def test_accelerate_steps_with_the_bits_of_adamw(make) -> None:
    data = batches(2 * STEPS)
    assert_equal_weights(Accelerated(make).train(data), Accelerated(plain).train(data))


@coded
def test_accelerate_learns_with_coded_state(make) -> None:
    data = batches(6 * STEPS)
    assert_learned(Accelerated(make).train(data), Accelerated(plain).train(data))


@resumed
def test_accelerate_resumes_with_the_same_bits(make, tmp_path) -> None:
    data = batches(2 * STEPS)
    whole = Accelerated(make)
    whole.train(data[:STEPS])
    whole.accelerator.save_state(str(tmp_path))
    again = Accelerated(make)
    again.accelerator.load_state(str(tmp_path))
    assert_equal_weights(again.train(data[STEPS:]), whole.train(data[STEPS:]))
    assert again.scheduler.get_last_lr() == whole.scheduler.get_last_lr()


def test_accelerate_resumes_coded_state_of_a_wrapped_optimizer(tmp_path) -> None:
    data = batches(2 * STEPS)
    whole, again = (Accelerated(CODED_OPTIMIZERS["wrapped"]) for _ in range(2))
    whole.train(data[:STEPS])
    whole.accelerator.save_state(str(tmp_path))
    again.accelerator.load_state(str(tmp_path))
    ours, theirs = (one.train(data[STEPS:]) for one in (again, whole))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-3


# Lightning


class Module(lightning.LightningModule):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.model, self.make = make_model(), make

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.model.parameters())
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class ManualModule(Module):
    """Calls ``step`` with a closure itself."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = loss_of(self.model, batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)
        self.lr_schedulers().step()


def fit(
    module: Module, data: list[Tensor], steps: int = STEPS, resume: Path | None = None, **more: Any
) -> Any:
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **more},
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def fitted(make: Make, steps: int = STEPS, kind: type[Module] = Module, **more: Any) -> nn.Module:
    module = kind(make)
    fit(module, batches(steps), steps, **more)
    return module.model


LIGHTNING = {
    "clipped": {"gradient_clip_val": 0.5},
    "bf16-mixed": {"precision": "bf16-mixed", "gradient_clip_val": 0.5},
    "closure": {"kind": ManualModule},
}


@pytest.mark.parametrize("options", LIGHTNING.values(), ids=LIGHTNING)
@exact
def test_lightning_steps_with_the_bits_of_adamw(make, options) -> None:
    assert_equal_weights(fitted(make, **options), fitted(plain, **options))


@pytest.mark.parametrize("options", LIGHTNING.values(), ids=LIGHTNING)
@coded
def test_lightning_learns_with_coded_state(make, options) -> None:
    steps = 3 * STEPS
    assert_learned(fitted(make, steps, **options), fitted(plain, steps, **options))


@resumed
def test_lightning_resumes_with_the_same_bits(make, tmp_path) -> None:
    """From the checkpoint that a run of two epochs leaves after the first."""
    data = batches(STEPS // 2)
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=STEPS // 2, save_top_k=-1)
    whole, again = Module(make), Module(make)
    fit(whole, data, callbacks=[saves], enable_checkpointing=True)
    trainer = fit(again, data, resume=tmp_path / f"step={STEPS // 2}.ckpt")
    assert trainer.global_step == STEPS
    assert_equal_weights(again.model, whole.model)


# A container of several optimizers, as in torchtitan


class Container(Optimizer):
    """One optimizer for each part of a model, with one flattened state dict by parameter names."""

    def __init__(self, parts: list[nn.Module], make: Make) -> None:
        self.parts = parts
        self.optimizers = [make(part.parameters()) for part in parts]
        everything = [p for part in parts for p in part.parameters()]
        super().__init__(everything, {})

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self.optimizers)

    def step(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(*args, **kwargs)

    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            found = get_optimizer_state_dict(part, optimizer, options=self.options)
            assert not set(found) & set(merged)
            merged.update(found)
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, state_dict, options=self.options)


class Part(nn.Module):
    """A part of a model whose parameter names differ from those of other parts."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(name, layer)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


def parts_of(model: nn.Module) -> list[nn.Module]:
    first, _, last = model
    return [Part("first", first), Part("last", last)]


class Contained:
    def __init__(self, make: Make) -> None:
        self.model = make_model()
        self.optimizers = Container(parts_of(self.model), make)
        self.schedulers = [lr_scheduler.ExponentialLR(one, 0.97) for one in self.optimizers]
        self.after: list[Any] = []
        self.optimizers.register_step_post_hook(lambda *_: self.after.append("all"))
        for one in self.optimizers:
            one.register_step_post_hook(lambda optimizer, *_: self.after.append(optimizer))

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "schedulers": [one.state_dict() for one in self.schedulers],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizers.load_state_dict(saved["optimizers"])
        for scheduler, state in zip(self.schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(state)

    def train(self, data: list[Tensor]) -> nn.Module:
        for x in data:
            self.optimizers.zero_grad()
            loss_of(self.model, x).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizers.step()
            for scheduler in self.schedulers:
                scheduler.step()
        return self.model


@exact
def test_container_steps_with_the_bits_of_adamw(make) -> None:
    ours = Contained(make)
    assert_equal_weights(ours.train(batches()), Contained(plain).train(batches()))
    first, last = ours.optimizers
    assert ours.after == [first, last, "all"] * STEPS


@coded
def test_container_learns_with_coded_state(make) -> None:
    data = batches(3 * STEPS)
    assert_learned(Contained(make).train(data), Contained(plain).train(data))


@pytest.mark.parametrize("file", ["torch.save", "dcp"])
@resumed
def test_container_resumes_from_a_flattened_state_dict(make, file, tmp_path) -> None:
    data = batches()
    whole, again = Contained(make), Contained(make)
    whole.train(data[: STEPS // 2])
    saved = whole.state_dict()
    assert all(isinstance(key, str) for key in saved["optimizers"])
    if file == "dcp":
        dcp.save(saved, checkpoint_id=tmp_path)
        read = again.state_dict()
        dcp.load(read, checkpoint_id=tmp_path)
    else:
        torch.save(saved, tmp_path / "half.pt")
        read = torch.load(tmp_path / "half.pt", weights_only=True)
    again.load_state_dict(read)
    assert_equal_weights(again.train(data[STEPS // 2 :]), whole.train(data[STEPS // 2 :]))
