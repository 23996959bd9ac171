"""torch.distributed.checkpoint of weights that are not contiguous, renamed and flattened."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lowbit_adam import AdamW4bit, AdamW8bit, Lion8bit
from optstate_codecs import decode_state
from stochbf16 import AdamW as StochasticAdamW
from turboadam import TurboAdam

CLASSES = (AdamW4bit, AdamW8bit, Lion8bit, TurboAdam, StochasticAdamW)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(cls, layout: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 4, bias=False))
    model[0].to(memory_format=LAYOUTS[layout])
    return model, cls(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch", "ignore:.*:UserWarning:torch")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("layout", "other"),
    [("channels_last", "channels_last"), ("channels_last", "contiguous")],
    ids=["same", "other"],
)
def test_moments_survive(cls, layout: str, other: str, flat: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = make(cls, layout)
    train(model, optimizer, range(3))
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path)

    resumed, target = make(cls, other)
    resumed.load_state_dict(model.state_dict())
    state = {"optimizer": get_optimizer_state_dict(resumed, target, options=options)}
    checkpoint.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(resumed, target, state["optimizer"], options=options)
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        before, after = decode_state(optimizer, one), decode_state(target, two)
        for key, value in before.items():
            if layout == other:
                assert torch.equal(after[key], value)
            else:
                # encoded anew, for blocks of other elements
                error = float((after[key] - value).norm() / value.norm())
                assert error < 0.5
                gain = float((after[key] * value).sum() / value.square().sum())
                assert abs(gain - 1) < 0.15
    if layout == other:
        train(model, optimizer, range(3, 5))
        train(resumed, target, range(3, 5))
        for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch", "ignore:.*:UserWarning:torch")
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_whole_state_dict_is_loaded_in_place(cls, tmp_path: Path) -> None:
    """``dcp.load(optimizer.state_dict())`` fills the live tensors; nothing else is called."""
    model, optimizer = make(cls, "channels_last")
    train(model, optimizer, range(4))
    checkpoint.save({"o": optimizer.state_dict()}, checkpoint_id=tmp_path)
    resumed, target = make(cls, "channels_last")
    train(resumed, target, range(1))
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    checkpoint.load({"o": target.state_dict()}, checkpoint_id=tmp_path)
    train(model, optimizer, range(4, 6))
    train(resumed, target, range(4, 6))
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
