"""On a GPU, state on the host: torch's own bits where exact, and the device store's where coded."""

import copy

import pytest
import torch
from torch.nn import Parameter

from optstate_wrap import ConfigurablePolicy, OffloadOptimizer, wrap

pytestmark = pytest.mark.cuda

CODED = {"exp_avg": "int8(block_size=128)", "exp_avg_sq": "oneq(bits=8,block_size=128)"}


def trained(make, steps=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((700, 333), (5,), (128, 256))
    params = [Parameter(torch.randn(s, generator=generator).to("cuda", dtype)) for s in shapes]
    optimizer = make(params)
    for step in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_exact_is_torch(inner, dtype, options) -> None:
    more = {"momentum": 0.9} if inner is torch.optim.SGD else {"amsgrad": True}
    plain, _ = trained(lambda p: inner(p, 1e-2, weight_decay=0.1, **more, **options), dtype=dtype)
    ours, optimizer = trained(
        lambda p: OffloadOptimizer(inner(p, 1e-2, weight_decay=0.1, **more, **options)),
        dtype=dtype,
    )
    assert all(map(torch.equal, plain, ours))
    assert optimizer.memory_report().host_bytes > 0


def test_coded_is_the_device_store() -> None:
    policy = ConfigurablePolicy(CODED, warmup_steps=2)
    plain, _ = trained(lambda p: wrap(torch.optim.AdamW(p), policy, 8192))
    ours, optimizer = trained(
        lambda p: OffloadOptimizer(torch.optim.AdamW(p), policy, chunk_size=8192)
    )
    assert optimizer.engine.fused._prepared
    assert all(map(torch.equal, plain, ours))


def test_a_copy_has_what_is_still_being_stored() -> None:
    params, optimizer = trained(lambda p: OffloadOptimizer(torch.optim.AdamW(p), CODED))
    twins, other = copy.deepcopy((params, optimizer))
    for side, of in ((params, optimizer), (twins, other)):
        for param in side:
            param.grad = torch.full_like(param, 0.5)
        of.step()
    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("codecs", [{}, CODED], ids=["exact", "coded"])
def test_state_may_be_written(codecs, store) -> None:
    """A moment that is made zero moves nothing, and what others put there stays where it is."""
    options = {"lr": 1e-2, "weight_decay": 0.0, "foreach": False}
    params, optimizer = trained(
        lambda p: wrap(torch.optim.AdamW(p, **options), ConfigurablePolicy(codecs), store=store), 3
    )
    before = [param.detach().clone() for param in params]
    for number, param in enumerate(params):
        state = optimizer.state[param]
        if number:
            state["exp_avg"].zero_()
        else:
            state["exp_avg"] = torch.zeros_like(param)
        slow = state.setdefault("slow", torch.ones_like(param))
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(map(torch.equal, before, params))
    assert optimizer.state[params[-1]]["slow"] is slow
    assert slow.is_cuda
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not any(map(torch.equal, before, params))
