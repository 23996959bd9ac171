"""The step on the host. Where there is no device, parameters on the CPU are taken for remote."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

from optstate_wrap import CPUOffloadOptimizer, cpu_offload, host_step

ADAMW = {"lr": 1e-2, "fused": True}
SMALL = 100


class Pretends(CPUOffloadOptimizer):
    """Takes the CPU for a device, so that large parameters are copied, and copies stepped."""

    def _remote(self, param) -> bool:
        return True


def plain(groups):
    return torch.optim.AdamW(groups, **ADAMW)


def pretends(groups, optimizer_class=torch.optim.AdamW, **options):
    return Pretends(groups, optimizer_class, **{"lr": 1e-2, "minimal_size": SMALL, **options})


@pytest.fixture(params=[False, True], ids=["kept", "offloaded"])
def offload(request):
    return request.param


class Net(torch.nn.Sequential):
    """Two large weights, and two small biases."""

    def __init__(self, dtype=torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 7))
        self.to(dtype)

    def loss(self, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch)
        data = torch.randn(8, 20, generator=generator).to(self[0].weight.dtype)
        return self(data).float().square().mean()


def pair(dtype=torch.float32, **options):
    """The same net twice, with torch's optimizer and with ours."""
    nets = Net(dtype), Net(dtype)
    return nets, (plain(nets[0].parameters()), pretends(nets[1].parameters(), **options))


def equal(left, right) -> bool:
    return all(map(torch.equal, left.parameters(), right.parameters()))


def equal_states(left, right) -> bool:
    left, right = left.state_dict()["state"], right.state_dict()["state"]
    return left.keys() == right.keys() and all(
        torch.equal(value, right[number][key])
        for number, state in left.items()
        for key, value in state.items()
    )


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
    if cls in cpu_offload.FUSED_ON_HOST and "foreach" not in options:
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
    assert not any(map(optimizer._copies.has_gradient, net.parameters()))
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


def test_checkpoints_exchange_with_torch_s(problem, same, offload) -> None:
    theirs, ours = problem(plain).run(3), problem(pretends).run(3)
    ours.optimizer.offload_gradients = offload
    ours.optimizer.load_state_dict(theirs.optimizer.state_dict())
    theirs.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    same(theirs.run(2), ours.run(2))


def test_loading_aliases_nothing_and_keeps_the_way_of_the_step(problem) -> None:
    saved = problem(lambda g: torch.optim.AdamW(g, lr=1e-2, foreach=True)).run(2).optimizer
    state = saved.state_dict()
    kept = copy.deepcopy(state["state"])
    run = problem(pretends)
    run.optimizer.load_state_dict(state)
    assert {group["fused"] for group in run.optimizer.param_groups} == {True}
    assert {group["foreach"] for group in run.optimizer.param_groups} == {None}
    run.run(2)
    for number, values in state["state"].items():
        assert all(torch.equal(value, kept[number][key]) for key, value in values.items())


def test_loaded_state_of_large_parameters_never_goes_to_their_device() -> None:
    state = plain([Parameter(torch.ones(shape)) for shape in (300, 3)])
    for param in state.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    state.step()
    params = [Parameter(torch.empty(shape, device="meta")) for shape in (300, 3)]
    optimizer = CPUOffloadOptimizer(params, fused=False, minimal_size=SMALL)
    optimizer.load_state_dict(state.state_dict())
    large, small = (optimizer.state[param]["exp_avg"] for param in params)
    assert torch.equal(large, state.state_dict()["state"][0]["exp_avg"])
    assert small.is_meta


def test_a_state_dict_that_does_not_fit_changes_nothing(problem, same) -> None:
    runs = problem(pretends).run(2), problem(pretends).run(2)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        runs[1].optimizer.load_state_dict(plain([Parameter(torch.ones(3))]).state_dict())
    same(*[run.run(2) for run in runs])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike(offload, how) -> None:
    (_, net), (_, optimizer) = pair(offload_gradients=offload)
    net.loss(0).backward()
    optimizer.step()
    if how == "deepcopy":
        twin, other = copy.deepcopy((net, optimizer))
    else:
        file = io.BytesIO()
        torch.save((net, optimizer), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    for module, of in ((net, optimizer), (twin, other)):
        of.zero_grad()
        module.loss(1).backward()
        assert (module[0].weight.grad is None) == offload
        of.step()
    assert equal(net, twin)
    assert equal_states(optimizer, other)


def test_hooks_and_closure_once(offload) -> None:
    nets, optimizers = pair(offload_gradients=offload)
    heard = []
    optimizers[1].register_step_pre_hook(lambda *_: heard.append("before"))
    optimizers[1].inner.register_step_post_hook(lambda *_: heard.append("after"))
    losses = []
    for net, optimizer in zip(nets, optimizers, strict=True):

        def closure(net=net, optimizer=optimizer):
            heard.append("closure")
            optimizer.zero_grad()
            loss = net.loss(0)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))
    assert heard == ["closure", "before", "closure", "after"]
    assert losses[0] == losses[1]
    assert equal(*nets)


@pytest.mark.parametrize("unscaled", [True, False])
def test_scaler(unscaled) -> None:
    nets, optimizers = pair()
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in nets]
    for batch in range(4):
        for net, optimizer, scaler in zip(nets, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(net.loss(batch)).backward()
            if batch == 2:
                net[0].weight.grad[0, 0] = float("inf")
            if unscaled:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-2)
            before = copy.deepcopy(net)
            scaler.step(optimizer)
            scaler.update()
            assert equal(before, net) == (batch == 2)
    assert scalers[1].get_scale() == 128.0
    assert equal(*nets)


@pytest.mark.parametrize("unscaled", [True, False])
def test_scaler_and_offloaded_gradients_are_refused(unscaled) -> None:
    (_, net), (_, optimizer) = pair(offload_gradients=True)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(net)
    scaler.scale(net.loss(0)).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="offload_gradients=True: GradScaler"):
        scaler.step(optimizer)
    assert equal(before, net)


def test_an_optimizer_that_is_gone_leaves_gradients_alone() -> None:
    (_, net), (_, optimizer) = pair(offload_gradients=True)
    gone = weakref.ref(optimizer)
    del optimizer, _
    gc.collect()
    assert gone() is None
    net.loss(0).backward()
    assert all(param.grad is not None for param in net.parameters())


def test_a_step_that_fails_leaves_the_optimizer_usable(monkeypatch, problem, same) -> None:
    monkeypatch.setattr(host_step, "CHUNK", 1000)
    run = problem(pretends).run(2)
    groups = run.optimizer.param_groups
    run.set_gradients()
    step = torch.optim.AdamW.step.__wrapped__
    calls = []

    def fails(self, closure=None):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW.step, "__wrapped__", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        run.optimizer.step()
    monkeypatch.undo()
    assert run.optimizer.param_groups is groups
    params = [p for group in groups for p in group["params"]]
    assert all(a is b for a, b in zip(params, run.params, strict=True))
    assert {id(p) for p in run.optimizer.state} <= {id(p) for p in params}
    same(copy.deepcopy(run).run(1), run.run(1))


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


def on_gpu(**options):
    """A net on the GPU, six weights of 4 MiB and six small biases, and its optimizer."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(6)]).cuda()
    return net, CPUOffloadOptimizer(net.parameters(), lr=1e-3, **options)


def train(net, optimizer, steps=4, passes=2):
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(steps):
        for _ in range(passes):
            x = torch.randn(64, 1024, device="cuda", generator=generator)
            net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.cuda
def test_on_a_gpu_offloaded_gradients_have_the_same_bits() -> None:
    runs = on_gpu(), on_gpu(offload_gradients=True)
    for net, optimizer in runs:
        train(net, optimizer)
    assert equal(runs[0][0], runs[1][0])
    assert equal_states(runs[0][1], runs[1][1])
    for copies in (optimizer._copies.made.values() for _, optimizer in runs):
        assert all(copy.host.is_pinned() and copy._buffer.is_pinned() for copy in copies)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_the_host_steps(offload, dtype) -> None:
    twins = [Parameter(torch.randn(700, 130).to(dtype)) for _ in range(5)]
    ours = [Parameter(twin.detach().cuda()) for twin in twins]
    theirs = plain(twins)
    optimizer = CPUOffloadOptimizer(ours, lr=1e-2, offload_gradients=offload)
    for step in range(4):
        for number, (param, twin) in enumerate(zip(ours, twins, strict=True)):
            twin.grad = None if number == step else torch.randn_like(twin)
            param.grad = None if twin.grad is None else twin.grad.cuda()
        theirs.step()
        optimizer.step()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, twins, strict=True))
    states = [state for param in ours for state in optimizer.state[param].values()]
    assert {value.device.type for value in states} == {"cpu"}


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_a_gpu_a_step_waits_for_its_copies_only(offload) -> None:
    net, optimizer = on_gpu(offload_gradients=offload)
    train(net, optimizer)
    net(torch.randn(64, 1024, device="cuda")).square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_on_a_gpu_offloaded_gradients_take_no_memory(monkeypatch) -> None:
    monkeypatch.setattr("optstate_wrap.lanes.WAITING", 1 << 22)
    net, optimizer = on_gpu(offload_gradients=True)
    train(net, optimizer, passes=1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    train(net, optimizer, passes=1)
    # of six gradients of 4 MiB: one that is made, one or two on their way, and activations
    assert torch.cuda.max_memory_allocated() - held < 18 << 20


@pytest.mark.cuda
def test_on_a_gpu_loading_needs_no_room(offload) -> None:
    net, optimizer = on_gpu(offload_gradients=offload)
    train(net, optimizer)
    state = optimizer.state_dict()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    optimizer.load_state_dict(state)
    assert torch.cuda.max_memory_allocated() - held < 1 << 20
    theirs = torch.optim.AdamW(net.parameters(), lr=1e-3)
    theirs.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(theirs.state_dict())
    assert equal_states(copy.deepcopy(optimizer), optimizer)
    train(net, optimizer)
    assert optimizer.state[net[0].weight]["exp_avg"].device.type == "cpu"
