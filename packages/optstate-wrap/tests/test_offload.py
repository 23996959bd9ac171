"""State in the host's memory. What needs a device is tested on one, where there is one."""

import pytest
import torch
from torch.nn import Parameter

from optstate_wrap import OffloadOptimizer

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


def test_scales_of_blocks_that_fit_into_rows(problem, same) -> None:
    same(
        *(
            problem(
                lambda groups, store=store: OffloadOptimizer(
                    torch.optim.AdamW(groups, lr=1e-2), CODED, store
                ),
                shapes=((8, 512), (3, 2, 256), (512,)),
            ).run(3)
            for store in ("device", "host")
        )
    )


def test_host_state_lies_in_one_slab_a_chunk(problem) -> None:
    run = problem(
        lambda groups: OffloadOptimizer(torch.optim.AdamW(groups), CODED), shapes=((600,), (900,))
    ).run(1)
    records = run.optimizer.engine.store.records
    storages = {
        part.untyped_storage().data_ptr()
        for param in run.params
        for key in CODED
        for part in records(param)[0][key].parts
    }
    assert len(storages) == 1


def test_bad_state_is_named() -> None:
    with pytest.raises(TypeError, match="state=3: must be a Policy, a map"):
        OffloadOptimizer(torch.optim.AdamW([Parameter(torch.ones(3))]), 3)


@pytest.mark.cuda
def test_a_gpu_holds_no_state() -> None:
    param = Parameter(torch.randn(1 << 20, device="cuda"))
    twin = Parameter(param.detach().clone())
    inner = torch.optim.AdamW([twin], lr=1e-2, foreach=False)
    ours = OffloadOptimizer(torch.optim.AdamW([param], lr=1e-2, foreach=False))
    for _ in range(3):
        param.grad = torch.randn_like(param)
        twin.grad = param.grad.clone()
        ours.step()
        inner.step()
    assert torch.equal(param, twin)
    report = ours.memory_report()
    assert report.host_bytes == report.state_bytes
