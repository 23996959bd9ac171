"""State in the host's memory. What needs a second device is tested on one, where there is one."""

import copy

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

from optstate_wrap import CPUOffloadOptimizer, OffloadOptimizer

CODED = {"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)"}


@pytest.mark.parametrize("state", [None, CODED], ids=["exact", "coded"])
def test_stores_give_the_same_bits(problem, same, state) -> None:
    runs = [
        problem(
            lambda groups, store=store: OffloadOptimizer(
                torch.optim.AdamW(groups, lr=1e-2), state, store, chunk_size=256
            )
        ).run(5)
        for store in ("device", "host")
    ]
    same(*runs)
    if state is None:
        same(problem(lambda groups: torch.optim.AdamW(groups, lr=1e-2)).run(5), runs[1])


def test_host_state_lies_in_one_slab_a_chunk(problem) -> None:
    run = problem(
        lambda groups: OffloadOptimizer(torch.optim.AdamW(groups), CODED), shapes=((600,), (900,))
    ).run(1)
    kept = run.optimizer.engine.store.kept
    storages = {
        part.untyped_storage().data_ptr()
        for param in run.params
        for key in CODED
        for part in kept(param)[0][key].parts
    }
    assert len(storages) == 1


def test_bad_state_is_named() -> None:
    with pytest.raises(TypeError, match="state=3: must be a Policy, a map"):
        OffloadOptimizer(torch.optim.AdamW([Parameter(torch.ones(3))]), 3)


def make(groups, **options):
    return CPUOffloadOptimizer(groups, torch.optim.AdamW, lr=1e-2, minimal_size=100, **options)


def test_on_a_cpu_it_is_the_optimizer_itself(problem, same) -> None:
    plain = problem(lambda groups: torch.optim.AdamW(groups, lr=1e-2)).run(4)
    ours = problem(make).run(4)
    same(plain, ours)
    same(copy.deepcopy(ours).run(2), ours.run(2))


class Pretends(CPUOffloadOptimizer):
    """Takes large parameters on the CPU for parameters of a device."""

    def _offloaded(self, param) -> bool:
        return param.numel() >= self.minimal_size


def pretends(groups, **options):
    return Pretends(groups, torch.optim.AdamW, lr=1e-2, minimal_size=100, **options)


def test_traps_of_offloading(problem, same) -> None:
    """Clipping, weights loaded later, schedules, missing gradients, exchange of checkpoints."""
    plain = problem(lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    ours = problem(pretends)
    schedulers = [lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5) for run in (plain, ours)]
    for step in range(5):
        for run, scheduler in zip((plain, ours), schedulers, strict=True):
            run.set_gradients()
            torch.nn.utils.clip_grad_norm_([p for p in run.params if p.grad is not None], 1.0)
            run.optimizer.step()
            scheduler.step()
            if step == 1:
                run.params[0].data.mul_(0.5)
            if step == 2:
                run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        same(plain, ours)
    assert ours.optimizer.param_groups[0]["params"][0] is ours.params[0]
    plain.optimizer.load_state_dict(ours.optimizer.state_dict())
    before = ours.tensors()
    ours.optimizer.zero_grad()
    ours.optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in ours.tensors().items())


def test_offloaded_gradients_are_freed(problem) -> None:
    run = problem(lambda groups: pretends(groups, offload_gradients=True)).run(1)
    for param in run.params:
        if param.numel() >= 100:
            assert param.grad is None


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["host", "cpu"])
def test_a_gpu_holds_no_state(kind) -> None:
    param = Parameter(torch.randn(1 << 20, device="cuda"))
    twin = Parameter(param.detach().clone())
    inner = torch.optim.AdamW([twin], lr=1e-2, foreach=False)
    if kind == "host":
        ours = OffloadOptimizer(torch.optim.AdamW([param], lr=1e-2, foreach=False))
    else:
        ours = CPUOffloadOptimizer([param], torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        param.grad = torch.randn_like(param)
        twin.grad = param.grad.clone()
        ours.step()
        inner.step()
    assert all(v.device.type == "cpu" for v in ours.state[param].values()) or kind == "host"
    if kind == "host":
        assert torch.equal(param, twin)
        report = ours.memory_report()
        assert report.host_bytes == report.state_bytes
    torch.testing.assert_close(param, twin)
