"""Gradient release steps every optimizer of the family, bit by bit as a plain step does."""

from functools import partial

import pytest
import torch
from torch import nn

import lowbit_adam
import stochbf16
import turboadam
from optstate_codecs import GradientRelease
from optstate_wrap import wrap_low_memory_adamw, wrap_max_compression_adamw

FAMILY = [
    *[getattr(lowbit_adam, n) for n in ("Adam8bit", "AdamW8bit", "Adam4bit", "AdamW4bit")],
    *[getattr(lowbit_adam, n) for n in ("AdamFp8", "AdamWFp8", "Lion8bit", "SGD8bit")],
    turboadam.TurboAdam,
    *[getattr(stochbf16, n) for n in ("Adam", "AdamW", "Compass", "LPFAdamW", "Lion", "RMSProp")],
    stochbf16.SGD,
    partial(wrap_low_memory_adamw, warmup_steps=2),
    wrap_max_compression_adamw,
]


def named(make) -> str:
    kind = getattr(make, "func", make)
    return f"{kind.__module__.split('.')[0]}-{kind.__name__}"


def train(make, dtype: torch.dtype, released: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 70), nn.Tanh(), nn.Linear(70, 70), nn.Tanh())
    head = nn.Linear(70, 40)
    head.weight.data.copy_(model[0].weight.data.T)
    model.to(dtype)
    head.to(dtype)
    optimizer = make([{"params": model.parameters(), "lr": 3e-3}, {"params": head.parameters()}])
    release = GradientRelease(optimizer, bucket_bytes=6000)
    if released:
        release.attach()
    for step in range(5):
        hidden = torch.ones(4, 40, dtype=dtype) + step
        # tied: the first layer's weight is used twice
        hidden = torch.tanh(model(hidden) @ model[0].weight)
        (hidden if step == 2 else head(model(hidden))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    params = [*model.parameters(), *head.parameters()]
    state = [optimizer.state.get(param, {}) for param in params]
    return [*params, *[v for of in state for v in of.values() if isinstance(v, torch.Tensor)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", FAMILY, ids=named)
def test_every_optimizer_of_the_family(make, dtype) -> None:
    ours, whole = train(make, dtype, released=True), train(make, dtype, released=False)
    assert len(ours) == len(whole) > 6
    assert all(map(torch.equal, ours, whole))
