"""What a step on the host leaves behind: checkpoints, copies, hooks, the scaler, failures."""

import copy
import gc
import io
import weakref
from collections import defaultdict

import pytest
import torch
from host_nets import SMALL, equal, equal_states, pair, plain, pretends
from torch.nn import Parameter

from optstate_wrap import CPUOffloadOptimizer
from optstate_wrap.cpu import host_step


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
    for param in state.param_groups[0]["params"]:
        state.state[param]["slow"] = torch.ones_like(param)
    params = [Parameter(torch.empty(shape, device="meta")) for shape in (300, 3)]
    optimizer = CPUOffloadOptimizer(params, fused=False, minimal_size=SMALL)
    optimizer.load_state_dict(state.state_dict())
    # what is not the optimizer's own goes where torch loads it to
    assert all(optimizer.state[param]["slow"].is_meta for param in params)
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


def test_state_may_be_written_and_replaced(problem, same) -> None:
    runs = problem(plain).run(3), problem(pretends).run(3)
    for run in runs:
        state = run.optimizer.state[run.params[0]]
        state["exp_avg"].zero_()
        state["exp_avg_sq"] = torch.ones_like(run.params[0])
        state["slow"] = run.params[0].detach().clone()
        assert run.optimizer.state[run.params[0]]["slow"] is state["slow"]
    same(*[run.run(2) for run in runs])
    for run in runs:
        run.optimizer.__setstate__({"state": defaultdict(dict)})
        assert not run.optimizer.state
    same(*[run.run(2) for run in runs])
    groups = [{**group, "lr": 0.5} for group in runs[1].optimizer.param_groups]
    runs[1].optimizer.__setstate__({"param_groups": groups})
    assert runs[1].optimizer.param_groups is groups is runs[1].optimizer.inner.param_groups
