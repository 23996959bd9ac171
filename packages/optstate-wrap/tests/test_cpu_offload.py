"""The step on the host. Where there is no device, parameters on the CPU are taken for remote."""

import copy

import pytest
import torch
from host_nets import SMALL, Net, Pretends, equal, equal_states, pair, plain, pretends
from torch.nn import Parameter
from torch.optim import lr_scheduler

from optstate_wrap import CPUOffloadOptimizer
from optstate_wrap.cpu import host_step, offload


def test_on_a_cpu_it_is_the_optimizer_itself(problem, same) -> None:
    def ours(groups):
        return CPUOffloadOptimizer(groups, torch.optim.AdamW, lr=1e-2, minimal_size=SMALL)

    run = problem(ours).run(4)
    same(problem(plain).run(4), run)
    assert not run.optimizer._copies.made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_as_without(problem, same, offload, dtype) -> None:
    run = problem(lambda g: pretends(g, offload_gradients=offload), dtype).run(6)
    same(problem(plain, dtype).run(6), run)
    assert {p.numel() >= SMALL for p in run.optimizer._copies.made} == {True}


def test_every_optimizer_has_its_own_bits(problem, same, configuration, monkeypatch) -> None:
    cls, options, _ = configuration
    monkeypatch.setattr(host_step, "CHUNK", 1000)  # some rows of several, some of one
    if cls in offload.FUSED_ON_HOST and "foreach" not in options:
        options = {"fused": True, **options}

    def ours(groups):
        return Pretends(groups, cls, minimal_size=SMALL, **options)

    same(problem(lambda g: cls(g, **options)).run(5), problem(ours).run(5))


def test_rows_have_every_parameter_and_gradients_stay(problem, same, monkeypatch) -> None:
    monkeypatch.setattr(host_step, "CHUNK", 1000)
    shapes = ((700,), (50,), (250,), (800,), (110,), (101,))  # the last row is worth no call
    ours = problem(pretends, shapes=shapes)
    for _ in range(3):
        ours.set_gradients()
        grads = [param.grad for param in ours.params]
        ours.optimizer.step()
        assert all(p.grad is grad for p, grad in zip(ours.params, grads, strict=True))
    same(problem(plain, shapes=shapes).run(3), ours)


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, and has a smaller learning rate with each."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] /= group["count"]
        return super().step(closure)


def test_groups_change_once_a_step(problem, same, monkeypatch) -> None:
    monkeypatch.setattr(host_step, "CHUNK", 1000)
    ours = problem(lambda groups: pretends(groups, Counting)).run(3)
    same(problem(lambda groups: Counting(groups, lr=1e-2)).run(3), ours)
    assert {group["count"] for group in ours.optimizer.param_groups} == {3}


class GlobalNorm(torch.optim.SGD):
    """Divides by the norm of all gradients, so that a few parameters cannot be stepped alone."""

    calls = 0

    def step(self, closure=None):
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(params, 0.1)
        type(self).calls += 1
        return super().step(closure)


def test_what_cannot_be_stepped_in_parts_is_stepped_whole(offload) -> None:
    nets = Net(), Net()
    for net in nets:
        net[0].requires_grad_(False)
    theirs = GlobalNorm(nets[0].parameters(), lr=1.0)
    ours = pretends(nets[1].parameters(), GlobalNorm, lr=1.0, offload_gradients=offload)
    for batch in range(3):
        for net, optimizer in zip(nets, (theirs, ours), strict=True):
            optimizer.zero_grad()
            net.loss(batch).backward()
            before = GlobalNorm.calls
            optimizer.step()
        assert GlobalNorm.calls == before + 1
        assert equal(*nets)
    # all of it on the host, so that it meets one device only
    assert ours._copies.made.keys() == set(nets[1].parameters())


def test_clipping_is_respected() -> None:
    nets, optimizers = pair()
    for batch in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            optimizer.step()
    assert equal(*nets)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_own_clipping_reaches_gradients_anywhere(offload, norm_type) -> None:
    nets, optimizers = pair(offload_gradients=offload)
    clips = (
        lambda: torch.nn.utils.clip_grad_norm_(nets[0].parameters(), 1e-3, norm_type),
        lambda: optimizers[1].clip_grad_norm_(1e-3, norm_type),
    )
    for batch in range(3):
        norms = []
        for net, optimizer, clip in zip(nets, optimizers, clips, strict=True):
            optimizer.zero_grad()
            net.loss(batch).backward()
            norms.append(clip())
            optimizer.step()
        assert norms[0] == norms[1] > 1e-3
    assert equal(*nets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_several_passes_add_up(offload, dtype) -> None:
    nets, optimizers = pair(dtype, offload_gradients=offload)
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            for batch in range(3):
                net.loss(10 * step + batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert equal(*nets)
    assert equal_states(*optimizers)


def test_offloaded_gradients_leave_the_device_in_the_backward_pass() -> None:
    (_, net), (_, optimizer) = pair(offload_gradients=True)
    net.loss(0).backward()
    for param in net.parameters():
        assert (param.grad is None) == (param.numel() >= SMALL)
    optimizer.step()
    assert all(optimizer._copies.gradient(param) is None for param in net.parameters())
    # used up: another step, or another backward pass after the model's own zero_grad, has no more
    before = copy.deepcopy(net)
    net.zero_grad()
    optimizer.step()
    assert equal(before, net)


def test_weights_loaded_later_stay(offload) -> None:
    nets, optimizers = pair(offload_gradients=offload)
    for batch in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            if batch == 1:
                net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()})
            if batch == 2:
                net[0].weight.data.mul_(0.5)  # of which no version counter knows
            net.loss(batch).backward()
            if batch == 3:
                net[2].weight.data = net[2].weight.data + 1
            optimizer.step()
    assert equal(*nets)


def test_a_model_may_become_another_dtype(offload) -> None:
    nets = Net(), Net()
    theirs = torch.optim.SGD(nets[0].parameters(), lr=0.1)
    ours = pretends(nets[1].parameters(), torch.optim.SGD, lr=0.1, offload_gradients=offload)
    for dtype in (torch.float32, torch.float64, torch.float32):
        for net, optimizer in zip(nets, (theirs, ours), strict=True):
            optimizer.zero_grad()
            net.to(dtype)
            net.loss(0).backward()
            optimizer.step()
        assert equal(*nets)


def test_a_schedule_reaches_every_parameter(offload) -> None:
    nets, optimizers = pair(offload_gradients=offload)
    schedules = [lr_scheduler.OneCycleLR(o, 0.1, total_steps=5) for o in optimizers]
    for batch in range(5):
        for net, optimizer, schedule in zip(nets, optimizers, schedules, strict=True):
            optimizer.zero_grad()
            net.loss(batch).backward()
            optimizer.step()
            if batch < 4:
                schedule.step()
    assert equal(*nets)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_before_a_step(offload, set_to_none) -> None:
    nets, optimizers = pair(offload_gradients=offload)
    for batch in range(2):
        for net, optimizer in zip(nets, optimizers, strict=True):
            net.loss(batch).backward()
            before = copy.deepcopy(net)
            optimizer.zero_grad(set_to_none)
            optimizer.step()
    assert equal(*nets)
    assert equal(before, nets[1]) == set_to_none  # zeros are gradients too: weights decay


def test_groups_are_the_user_s(problem, offload) -> None:
    run = problem(lambda groups: pretends(groups, offload_gradients=offload))
    held = run.optimizer.param_groups
    groups = list(held)
    run.run(2)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert run.optimizer.param_groups is held
    assert all(a is b for a, b in zip(held, groups, strict=True))
    params = [p for group in groups for p in group["params"]]
    assert all(a is b for a, b in zip(params, run.params, strict=True))
    assert [group["lr"] for group in groups] == [1e-2, 3e-3]
    assert {id(p) for p in run.optimizer.state} <= {id(p) for p in params}


def test_a_group_may_come_later(offload) -> None:
    nets = Net(), Net()
    optimizers = (
        plain(nets[0][0].parameters()),
        pretends(nets[1][0].named_parameters(), offload_gradients=offload),
    )
    for batch in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            if batch == 2:
                params = net[2].parameters() if net is nets[0] else net[2].named_parameters()
                optimizer.add_param_group({"params": params, "lr": 1e-3})
            net.zero_grad()
            optimizer.zero_grad()
            net.loss(batch).backward()
            if net is nets[1] and batch == 2:
                assert (net[2].weight.grad is None) == offload
            optimizer.step()
    assert equal(*nets)


def test_frozen_parameters_cost_nothing_until_they_are_trained(offload) -> None:
    nets = Net(), Net()
    for net in nets:
        net[0].requires_grad_(False)
    ours = pretends(nets[1].parameters(), offload_gradients=offload)
    optimizers = plain(nets[0].parameters()), ours
    for batch in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            if batch == 2:
                net.requires_grad_(True)
            optimizer.zero_grad()
            net.loss(batch).backward()
            if net is nets[1] and batch == 3:
                # heard of from the step after it was unfrozen
                assert (net[0].weight.grad is None) == offload
            optimizer.step()
        assert (nets[1][0].weight in optimizers[1]._copies.made) == (batch >= 2)
    assert equal(*nets)


def test_a_gradient_that_is_refused_leaves_none_behind() -> None:
    made = []
    for make in (plain, pretends):
        params = [Parameter(torch.ones(300)) for _ in range(2)]
        optimizer = make(params)
        for step in range(2):
            params[0].grad, params[1].grad = torch.ones(300), torch.ones(300)
            if step == 0 and make is pretends:
                params[1].grad = torch.ones(300).to_sparse()
                with pytest.raises(TypeError, match=r"layout torch\.sparse_coo, must be dense"):
                    optimizer.step()
        optimizer.step()
        made.append(params)
    assert all(map(torch.equal, *made))


@pytest.mark.parametrize("layout", ["channels last", "transposed", "strided"])
def test_layouts(layout, offload) -> None:
    made = []
    for cls in (torch.optim.AdamW, pretends):
        torch.manual_seed(0)
        data, grad = torch.randn(2, 4, 6, 5, 8).unbind()
        if layout == "channels last":
            data = data.to(memory_format=torch.channels_last)
        elif layout == "transposed":
            data, grad = data.transpose(0, 2), grad.transpose(0, 2)
        else:
            data, grad = data[:, ::2], grad[:, ::2]
        param = Parameter(data)
        options = {"lr": 1e-2} if cls is torch.optim.AdamW else {"offload_gradients": offload}
        # of the plain one, a step that knows of layouts
        optimizer = cls([param], **options)
        for _ in range(3):
            param.grad = grad
            optimizer.step()
        made.append(param)
    torch.testing.assert_close(*made, rtol=1e-6, atol=1e-7)


def test_what_it_does_not_take_is_named() -> None:
    params = [Parameter(torch.ones(300))]
    with pytest.raises(TypeError, match="optimizer_class=LBFGS: its step must not need a closure"):
        CPUOffloadOptimizer(params, torch.optim.LBFGS)
    with pytest.raises(TypeError, match="offload_gradients=1: must be"):
        CPUOffloadOptimizer(params, offload_gradients=1)
    with pytest.raises(ValueError, match="minimal_size=-1: must be"):
        CPUOffloadOptimizer(params, minimal_size=-1)
