"""``step_parameter``: one parameter stepped by a hook during backward, as trainers call it."""

import pytest
import torch
from subjects import FIRST, SECOND
from torch import nn

from optstate_codecs import Adam, CodedOptimizer, GradientRelease, offload
from optstate_codecs.rules import SGD

FORMATS = {"exp_avg": FIRST, "exp_avg_sq": SECOND}


def build(dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    net.to(dtype)
    options = {"lr": 1e-2, "write": "stochastic", **options}
    groups = [
        {"params": list(net[0].parameters())},
        {"params": [*net[2].parameters(), *net[4].parameters()], "lr": 3e-3, "weight_decay": 0.1},
    ]
    return net, CodedOptimizer(groups, Adam(decoupled=True), FORMATS, **options)


def batches(count=5, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 24, generator=generator).to(dtype) for _ in range(count)]


def loss(net, batch):
    return net(batch).float().square().mean()


def fuse(optimizer):
    """Hooks that step each parameter as soon as it has its gradient, as OneTrainer adds them."""
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):

            def hook(tensor, group=group, i=i):
                optimizer.step_parameter(tensor, group, i)
                tensor.grad = None

            param.register_post_accumulate_grad_hook(hook)


def everything(net, optimizer):
    state = [value for p in net.parameters() for value in optimizer.state[p].values()]
    return [*net.parameters(), *state]


def assert_same(one, other):
    assert len(one) == len(other)
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("backend", ["eager", "compile"])
@pytest.mark.parametrize(
    "options", [{}, {"write": "split24"}, {"centralization": 1.0}, {"fused": True}], ids=str
)
def test_hooks_step_as_step_does(backend, options):
    net, optimizer = build(backend=backend, **options)
    fused_net, fused = build(backend=backend, **options)
    fuse(fused)
    for batch in batches():
        optimizer.zero_grad()
        loss(net, batch).backward()
        optimizer.step()
        loss(fused_net, batch).backward()
        assert all(p.grad is None for p in fused_net.parameters())
    assert_same(everything(net, optimizer), everything(fused_net, fused))


@pytest.mark.parametrize("store", ["host", "disk"])
def test_with_offloaded_state(store, tmp_path):
    where = {"store": store, "path": tmp_path / "state"} if store == "disk" else {"store": store}
    net, optimizer = build()
    fused_net, fused = build()
    fuse(offload(fused, chunk_bytes=2**12, **where))
    for batch in batches():
        optimizer.zero_grad()
        loss(net, batch).backward()
        optimizer.step()
        loss(fused_net, batch).backward()
    assert_same(everything(net, optimizer), everything(fused_net, fused))


def test_a_schedule_and_a_checkpoint_go_on():
    net, optimizer = build()
    fuse(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for batch in batches(2):
        loss(net, batch).backward()
        schedule.step()  # warns where it does not see a step, and warnings are errors here
    assert optimizer.param_groups[0]["lr"] == 0.0025
    resumed_net, resumed = build()
    resumed_net.load_state_dict(net.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for batch in batches(2):
        loss(net, batch).backward()
        resumed.zero_grad()
        loss(resumed_net, batch).backward()
        resumed.step()
    assert_same(everything(net, optimizer), everything(resumed_net, resumed))


def test_only_that_parameter_is_stepped():
    net, optimizer = build()
    loss(net, batches()[0]).backward()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step_parameter(net[2].weight)
    changed = [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)]
    assert changed == [False, False, True, False, False, False]
    assert [p for p in net.parameters() if optimizer.state.get(p)] == [net[2].weight]


def test_without_a_gradient_nothing_happens():
    net, optimizer = build()
    optimizer.step_parameter(net[0].weight, optimizer.param_groups[0], 0)
    assert not optimizer.state


def test_a_later_use_of_the_old_value_raises():
    weight = nn.Parameter(torch.ones(4))
    optimizer = CodedOptimizer([weight], SGD(), {}, lr=0.1)
    used = weight.detach() * torch.ones(4, requires_grad=True)
    weight.grad = torch.ones(4)
    optimizer.step_parameter(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.sum().backward()


def test_arguments_that_do_not_fit_are_refused():
    net, optimizer = build()
    loss(net, batches()[0]).backward()
    before = [p.detach().clone() for p in net.parameters()]
    first, second = optimizer.param_groups
    weight = net[0].weight
    with pytest.raises(
        ValueError, match=r"group: a dict with keys params, lr: must be one of the 2"
    ):
        optimizer.step_parameter(weight, {"params": [weight], "lr": 0.1}, 0)
    with pytest.raises(ValueError, match=r"group: param of shape \(32, 24\) is not in it"):
        optimizer.step_parameter(weight, second)
    with pytest.raises(ValueError, match="index=1: must be the position of param in group"):
        optimizer.step_parameter(weight, first, 1)
    with pytest.raises(ValueError, match="index=9: must be the position of param in group"):
        optimizer.step_parameter(weight, first, 9)
    with pytest.raises(ValueError, match="index=0: is a position in group"):
        optimizer.step_parameter(weight, index=0)
    with pytest.raises(KeyError, match="not a parameter of this optimizer"):
        optimizer.step_parameter(nn.Parameter(torch.ones(3)))
    assert_same(before, list(net.parameters()))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_nonfinite": True}, "skip_nonfinite=True: cannot be combined with step_parameter"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0: must be None under step_parameter"),
    ],
    ids=["skip_nonfinite", "max_grad_norm"],
)
def test_options_that_need_all_gradients_are_refused(options, message):
    net, optimizer = build(**options)
    loss(net, batches()[0]).backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step_parameter(net[0].weight, optimizer.param_groups[0], 0)
    assert not optimizer.state


def test_gradient_release_is_refused():
    net, optimizer = build()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with (
        GradientRelease(optimizer),
        pytest.raises(
            RuntimeError, match="step_parameter: cannot be combined with GradientRelease"
        ),
    ):
        optimizer.step_parameter(net[0].weight)
    assert not optimizer.state


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    dist = torch.distributed
    store = dist.FileStore(str(tmp_path / "rendezvous"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_hooks_under_fsdp2(mesh):
    from torch.distributed.fsdp import fully_shard

    nets, optimizers = [], []
    for _ in range(2):
        net, _unsharded = build(torch.float32, write="nearest")
        fully_shard(net, mesh=mesh)
        nets.append(net)
        optimizers.append(CodedOptimizer(net.parameters(), Adam(decoupled=True), FORMATS))
    fuse(optimizers[1])
    for batch in batches(3, torch.float32):
        optimizers[0].zero_grad()
        loss(nets[0], batch).backward()
        optimizers[0].step()
        loss(nets[1], batch).backward()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one.full_tensor(), other.full_tensor())
        assert optimizers[1].state[other]["step"] == 3
