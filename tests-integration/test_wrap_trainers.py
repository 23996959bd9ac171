"""Trainers drive a wrapped optimizer as they drive a plain one."""

import copy

import accelerate
import lightning
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from optstate_wrap import ConfigurablePolicy, WarmupPolicy, wrap

STEPS = 12


def make_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 1))


def batches() -> list[torch.Tensor]:
    return [torch.randn(16, 7, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - 1).square().mean()


def make_optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if kind == "plain":
        return inner
    policy = ConfigurablePolicy({}) if kind == "exact" else WarmupPolicy(3, min_int8_elements=64)
    return wrap(inner, policy, 256)


def one_cycle(optimizer: torch.optim.Optimizer) -> lr_scheduler.OneCycleLR:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=STEPS)


def plain_loop(kind: str) -> tuple[nn.Module, list[float]]:
    model, rates = make_model(), []
    optimizer = make_optimizer(model, kind)
    scheduler = one_cycle(optimizer)
    for x in batches():
        optimizer.zero_grad()
        loss_of(model, x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return model, rates


def with_accelerate(kind: str) -> tuple[nn.Module, list[float]]:
    accelerator = accelerate.Accelerator(cpu=True)
    model, rates = make_model(), []
    optimizer = make_optimizer(model, kind)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, one_cycle(optimizer))
    for x in batches():
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, x))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return accelerator.unwrap_model(model), rates


def with_lightning(kind: str) -> tuple[nn.Module, list[float]]:
    rates = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch, index):
            rates.append(self.optimizers().param_groups[0]["lr"])
            return loss_of(self.model, batch)

        def configure_optimizers(self):
            optimizer = make_optimizer(self.model, kind)
            scheduler = {"scheduler": one_cycle(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    module = Module()
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer.fit(module, loader)
    return module.model, rates


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loop", [plain_loop, with_accelerate, with_lightning])
@pytest.mark.parametrize("kind", ["exact", "int8"])
def test_follows_the_schedule_and_learns(loop, kind) -> None:
    model, rates = loop(kind)
    expected, expected_rates = plain_loop("plain")
    assert rates == expected_rates
    assert len(set(rates)) == STEPS
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        if kind == "exact":
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=5e-3)
    start = loss_of(make_model(), batches()[0])
    assert loss_of(copy.deepcopy(model), batches()[0]) < 0.5 * start
