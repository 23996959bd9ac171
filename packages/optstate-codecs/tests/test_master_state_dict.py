"""The state dict of a whole model with float32 master weights."""

import pytest
import torch
from torch import nn

from optstate_codecs import Adam, CodedOptimizer, master_state_dict, master_weights, offload

FORMATS = {"exp_avg": "fp32", "exp_avg_sq": "fp32"}


class Net(nn.Module):
    """Tied weights, a frozen parameter, a buffer, and an entry that is no tensor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.conv = nn.Conv2d(2, 3, 3)
        self.frozen = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        assert state == {"version": 1}


def build(dtype=torch.bfloat16, seed=0, **options):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    model.conv.to(memory_format=torch.channels_last)
    params = [p for name, p in model.named_parameters() if name != "frozen"]
    return model, CodedOptimizer(params, Adam(decoupled=True), FORMATS, lr=1e-4, **options)


def train(model, optimizer, steps=20):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                grad = torch.randn(p.shape, generator=generator).bfloat16()
                p.grad = torch.empty_like(p).copy_(grad)
        optimizer.step()


@pytest.mark.parametrize("write", ["split32", "split24", "nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_entry_is_what_it_should_be(write, dtype):
    if (write, dtype) == ("stochastic", torch.float16):
        pytest.skip("rounds to bfloat16 only")
    model, optimizer = build(dtype, write=write)
    train(model, optimizer)
    found = master_state_dict(optimizer, model)
    expected = model.state_dict()
    del expected["head.weight"]
    assert list(found) == list(expected)
    for name, param in model.named_parameters():
        if name == "frozen":
            assert found[name].data_ptr() == param.data_ptr()
            assert found[name].dtype == dtype
        else:
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], master_weights(optimizer, param))
            assert torch.equal(found[name].to(dtype), param) or write == "split24"
            assert torch.equal(found[name], param.float()) == (not write.startswith("split"))
        assert not found[name].requires_grad
    assert found["norm.running_mean"].data_ptr() == model.norm.running_mean.data_ptr()
    assert found["_extra_state"] == {"version": 1}


def test_split32_is_what_float32_training_would_have():
    """The oracle trains float32 copies with torch.optim's AdamW."""
    model, optimizer = build(write="split32")
    exact = Net().float()
    exact.load_state_dict(model.state_dict())
    exact.conv.to(memory_format=torch.channels_last)
    params = [p for name, p in exact.named_parameters() if name != "frozen"]
    reference = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    train(model, optimizer)
    train(exact, reference)
    found = master_state_dict(optimizer, model)
    for name, param in exact.named_parameters():
        torch.testing.assert_close(found[name].float(), param.data, rtol=1e-6, atol=1e-7)


def test_a_model_loads_it():
    model, optimizer = build(write="split24")
    train(model, optimizer)
    wide = Net()
    wide.load_state_dict(master_state_dict(optimizer, model, tied=True))
    assert wide.head.weight is wide.embed.weight
    assert torch.equal(wide.head.weight, master_weights(optimizer, model.head.weight))
    tied = master_state_dict(optimizer, model, tied=True)
    assert tied["head.weight"] is tied["embed.weight"]


def test_save_file_takes_it(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    model, optimizer = build(write="split32")
    model.conv.to(memory_format=torch.contiguous_format)
    train(model, optimizer)
    found = master_state_dict(optimizer, model, device="cpu")
    del found["_extra_state"]
    library.save_file(found, tmp_path / "model.safetensors")
    loaded = library.load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == found.keys()
    assert all(torch.equal(loaded[name], found[name]) for name in found)


def test_it_is_a_copy_that_steps_do_not_change():
    model, optimizer = build(torch.float32)
    train(model, optimizer, 1)
    found = master_state_dict(optimizer, model)
    before = found["embed.weight"].clone()
    train(model, optimizer, 1)
    assert torch.equal(found["embed.weight"], before)
    assert not torch.equal(model.embed.weight, before)


def test_before_the_first_step_and_of_a_part_of_the_model():
    model, optimizer = build(write="split24")
    found = master_state_dict(optimizer, model.embed)
    assert list(found) == ["weight"]
    assert torch.equal(found["weight"], model.embed.weight.float())


def test_offloaded_state():
    model, optimizer = build(write="split32")
    other, offloaded = build(write="split32")
    train(model, optimizer)
    train(other, offload(offloaded))
    found, expected = master_state_dict(offloaded, other), master_state_dict(optimizer, model)
    assert all(torch.equal(found[k], v) for k, v in expected.items() if k != "_extra_state")


def test_a_model_of_another_optimizer_is_refused():
    _, optimizer = build()
    with pytest.raises(ValueError, match="model=Linear: has none of the optimizer's 6 parameters"):
        master_state_dict(optimizer, nn.Linear(2, 2))


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    dist = torch.distributed
    store = dist.FileStore(str(tmp_path / "rendezvous"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("device", [None, "cpu"])
def test_dtensors_stay_dtensors(mesh, device):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    plain = nn.Linear(6, 8).bfloat16()
    model = nn.Linear(6, 8).bfloat16()
    for name, param in plain.named_parameters():
        sharded = distribute_tensor(param.detach().clone(), mesh, [Shard(0)])
        setattr(model, name, nn.Parameter(sharded))
    results = []
    for net in (plain, model):
        optimizer = CodedOptimizer(net.parameters(), Adam(), FORMATS, lr=1e-4, write="split32")
        for _ in range(3):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        results.append(master_state_dict(optimizer, net, device=device))
    for name, value in results[1].items():
        assert isinstance(value, DTensor)
        assert value.dtype == torch.float32
        assert value.placements == (Shard(0),)
        assert torch.equal(value.full_tensor(), results[0][name])
