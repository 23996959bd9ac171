"""torch.distributed.checkpoint saves and restores the optimizers, in a group of one process."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lowbit_adam import Adam8bit, AdamW8bit


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=[Adam8bit, AdamW8bit], ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> type[torch.optim.Optimizer]:
    return request.param


def make_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 65), nn.Tanh(), nn.Linear(65, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch", "ignore:.*:UserWarning:torch")
def test_save_load_and_go_on(cls, tmp_path: Path) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    train(model, optimizer, range(4))
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)

    resumed = make_model()
    resumed_optimizer = cls(resumed.parameters(), lr=1e-2)
    # This takes the step with gradients of zero that makes state to load into.
    weights, state = get_state_dict(resumed, resumed_optimizer)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(resumed, resumed_optimizer, model_state_dict=weights, optim_state_dict=state)

    train(model, optimizer, range(4, 8))
    train(resumed, resumed_optimizer, range(4, 8))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch", "ignore:.*:UserWarning:torch")
def test_making_state_changes_no_parameter(cls) -> None:
    model = make_model().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    optimizer = cls(model.parameters(), lr=1e-2, weight_decay=0.5, bf16_stochastic_round=True)
    get_state_dict(model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert len(optimizer.state) == 4
