"""torch.distributed.checkpoint gets, saves and sets the state, in a group of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from optstate_wrap import ConfigurablePolicy, CPUOffloadOptimizer, WarmupPolicy, wrap

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:FutureWarning:torch", "ignore:.*:UserWarning:torch"
)


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class OnHost(CPUOffloadOptimizer):
    """Takes the CPU for a device."""

    def _remote(self, param) -> bool:
        return True


def make(codecs, cls=torch.optim.AdamW):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 65), nn.Tanh(), nn.Linear(65, 3))
    if codecs is None:
        return model, OnHost(model.parameters(), offload_gradients=True, minimal_size=100)
    return model, wrap(cls(model.parameters(), lr=1e-2), ConfigurablePolicy(codecs), 256)


def train(model, optimizer, steps) -> None:
    for step in steps:
        x = torch.randn(8, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    "codecs", [{}, {"exp_avg": "int8"}, None], ids=["exact", "int8", "on host"]
)
def test_save_load_and_go_on(codecs, flatten, tmp_path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = make(codecs)
    train(model, optimizer, range(4))
    state = get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.save({"optimizer": state}, checkpoint_id=tmp_path)

    resumed, other = make(codecs)
    before = [p.detach().clone() for p in resumed.parameters()]
    state = get_optimizer_state_dict(resumed, other, options=options)
    assert all(map(torch.equal, before, resumed.parameters()))
    checkpoint.load({"optimizer": state}, checkpoint_id=tmp_path)
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, other, state, options=options)
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, other.state[theirs][key])
    train(model, optimizer, range(4, 8))
    train(resumed, other, range(4, 8))
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


@pytest.mark.parametrize("store", ["device", "host"])
def test_sharded_parameters_are_coded_by_shard(store) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    whole = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    codecs = {"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)"}
    sharded = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    plain = nn.Parameter(whole.clone())
    # both by the inner optimizer, whose square roots are torch's
    optimizers = [
        wrap(torch.optim.AdamW([p], lr=1e-2), ConfigurablePolicy(codecs), store=store, fused=False)
        for p in (sharded, plain)
    ]
    for step in range(4):
        grad = torch.randn(40, 256, generator=torch.Generator().manual_seed(step + 1))
        sharded.grad = distribute_tensor(grad, mesh, [Shard(0)])
        plain.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    moment = optimizers[0].state[sharded]["exp_avg"]
    assert isinstance(moment, DTensor)
    assert moment.placements == sharded.placements
    assert torch.equal(sharded.to_local(), plain)
    assert torch.equal(moment.to_local(), optimizers[1].state[plain]["exp_avg"])
    saved = copy.deepcopy(optimizers[0].packed_state_dict(per_rank=True))
    optimizers[0].load_state_dict(saved)
    assert torch.equal(optimizers[0].state[sharded]["exp_avg"].to_local(), moment.to_local())
    # of another worker, or of another number of workers
    for key in ("rank 1 of 2", "rank 0 of 2"):
        foreign = copy.deepcopy(saved)
        foreign["state"][0] = {key: foreign["state"][0]["rank 0 of 1"]}
        before = optimizers[0].state[sharded]["exp_avg"].to_local().clone()
        with pytest.raises(ValueError, match=f"'{key}'.*not by 'rank 0 of 1'"):
            optimizers[0].load_state_dict(foreign)
        assert torch.equal(optimizers[0].state[sharded]["exp_avg"].to_local(), before)
    # for all workers; and into a plain tensor, and back
    shown = optimizers[0].packed_state_dict()
    parts = shown["state"][0]["parts"][0]["exp_avg"]["parts"]
    assert [type(part) for part in parts] == [DTensor, DTensor]
    assert [tuple(part.shape) for part in parts] == [(40, 256), (40, 1)]
    for optimizer, other in (optimizers, optimizers[::-1]):
        other.load_state_dict(optimizer.packed_state_dict())
        for key in ("exp_avg", "exp_avg_sq"):
            pair = (optimizers[0].state[sharded][key].to_local(), optimizers[1].state[plain][key])
            assert torch.equal(*pair)


@pytest.mark.parametrize("store", ["device", "host"])
def test_state_that_is_one_workers_own_is_refused_by_name(store) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    param = nn.Parameter(distribute_tensor(torch.ones(64, 128), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.ones(64, 128), mesh, [Shard(0)])
    policy = ConfigurablePolicy({"exp_avg_sq": "linear4(normalization=rank1)"})
    options = {"store": store, "packed_checkpoints": True}
    optimizer = wrap(torch.optim.AdamW([param]), policy, **options)
    optimizer.step()
    for save in (optimizer.packed_state_dict, optimizer.state_dict):
        with pytest.raises(ValueError, match=r"'exp_avg_sq' of parameter 0.*per_rank=True"):
            save()
    optimizer.load_state_dict(optimizer.packed_state_dict(per_rank=True))
    optimizer.packed_checkpoints = False
    optimizer.load_state_dict(optimizer.state_dict())
    # an entry of a user's, whose place in the whole nobody knows
    optimizer = wrap(torch.optim.AdamW([param]), ConfigurablePolicy({}), **options)
    optimizer.step()
    optimizer.state_dict()
    optimizer.state[param]["noise"] = torch.ones(3)
    with pytest.raises(
        ValueError, match=r"'noise' of parameter 0 is a plain tensor of shape \(3,\)"
    ):
        optimizer.state_dict()


@pytest.mark.parametrize("store", ["device", "host"])
def test_packed_checkpoints_go_on_with_the_same_bits(store, tmp_path) -> None:
    """Also of stochastic codes, whose decoded checkpoints are rounded again."""

    def make_packed():
        model, _ = make({})
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        codecs = {"exp_avg": "int8(rounding=stochastic)", "exp_avg_sq": "bf16(rounding=stochastic)"}
        options = {"chunk_size": 256, "store": store, "packed_checkpoints": True}
        return model, wrap(inner, ConfigurablePolicy(codecs), **options)

    model, optimizer = make_packed()
    train(model, optimizer, range(4))
    state = get_optimizer_state_dict(model, optimizer)
    checkpoint.save({"optimizer": state}, checkpoint_id=tmp_path)
    resumed, other = make_packed()
    state = get_optimizer_state_dict(resumed, other)
    checkpoint.load({"optimizer": state}, checkpoint_id=tmp_path)
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, other, state)
    train(model, optimizer, range(4, 8))
    train(resumed, other, range(4, 8))
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_packed_state_cannot_be_flattened_nor_loaded_into_exact_state(tmp_path) -> None:
    def make_warm():
        model, _ = make({})
        policy = WarmupPolicy(2, min_int8_elements=1)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, wrap(inner, policy, packed_checkpoints=True)

    model, optimizer = make_warm()
    train(model, optimizer, range(4))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    with pytest.raises(NotImplementedError, match="only supports tensor, int, float, dict"):
        get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.save(
        {"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path
    )
    # a new optimizer's state is exact, and has no place for the codes
    state = get_optimizer_state_dict(*make_warm())
    with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict"):
        checkpoint.load({"optimizer": state}, checkpoint_id=tmp_path)
