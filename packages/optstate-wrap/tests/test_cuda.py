"""On a GPU: the same bits as without the wrapper, and no step waits for the device."""

import pytest
import torch
from torch.nn import Parameter

from optstate_wrap import ConfigurablePolicy, wrap

pytestmark = pytest.mark.cuda

CODED = {"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)"}
OPTIONS = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}


def params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((700, 33), (5,), (128, 256))
    made = [Parameter(torch.randn(s, generator=generator).to("cuda", dtype)) for s in shapes]
    return made


def set_gradients(of, step) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in of:
        param.grad = torch.randn(param.shape, generator=generator).to(param)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("store", ["device", "host"])
def test_exact_is_the_unwrapped_optimizer(options, dtype, store) -> None:
    plain, ours = params(dtype), params(dtype)
    theirs = torch.optim.AdamW(plain, lr=1e-2, **options)
    inner = torch.optim.AdamW(ours, lr=1e-2, **options)
    wrapped = wrap(inner, ConfigurablePolicy({}), 8192, store=store)
    assert wrapped.findings.splittable
    for step in range(4):
        for some, optimizer in ((plain, theirs), (ours, wrapped)):
            set_gradients(some, step)
            optimizer.step()
    assert all(map(torch.equal, plain, ours))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("codecs", [{}, CODED], ids=["exact", "coded"])
def test_a_step_does_not_wait_for_the_device(codecs) -> None:
    ours = params()
    wrapped = wrap(torch.optim.AdamW(ours, fused=True), ConfigurablePolicy(codecs), 8192)
    for step in range(2):
        set_gradients(ours, step)
        wrapped.step()
    set_gradients(ours, 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wrapped.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("codecs", [{}, CODED], ids=["exact", "coded"])
def test_scaler_with_a_fused_optimizer_skips_on_the_device(codecs) -> None:
    ours = params()
    wrapped = wrap(torch.optim.AdamW(ours, lr=1e-2, fused=True), ConfigurablePolicy(codecs), 8192)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    scaler.scale(torch.ones((), device="cuda"))
    for step in range(3):
        set_gradients(ours, step)
        scaler.step(wrapped)
        scaler.update()
    before = [p.detach().clone() for p in ours]
    moment = wrapped.state[ours[0]]["exp_avg"]
    set_gradients(ours, 3)
    ours[0].grad[0, 0] = float("inf")
    scaler.step(wrapped)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(map(torch.equal, before, ours))
    assert torch.equal(moment, wrapped.state[ours[0]]["exp_avg"])


@pytest.mark.parametrize("store", ["device", "host"])
def test_saving_and_loading_need_no_room_on_the_device(store) -> None:
    ours = [Parameter(torch.randn(1 << 18, device="cuda")) for _ in range(32)]
    wrapped = wrap(torch.optim.AdamW(ours), ConfigurablePolicy(CODED), store=store)
    set_gradients(ours, 0)
    wrapped.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for save in (wrapped.state_dict, wrapped.packed_state_dict):
        wrapped.load_state_dict(save())
    # the state of a parameter or two, and its coded twin; plain, all would be 64 MiB
    assert torch.cuda.max_memory_allocated() - held < 48 << 20


def test_memory_of_a_step_is_a_chunk_s(monkeypatch) -> None:
    """Beside state, parameters and gradients a step needs no more than scratch for one chunk."""
    numel, chunk = 1 << 22, 1 << 20
    ours = [Parameter(torch.randn(chunk, device="cuda")) for _ in range(numel // chunk)]
    wrapped = wrap(torch.optim.AdamW(ours, fused=True), ConfigurablePolicy(CODED), chunk)
    for step in range(3):
        set_gradients(ours, step)
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        wrapped.step()
    # old parameters, decoded and new codes of a chunk, and the codecs' own temporaries
    assert torch.cuda.max_memory_allocated() - held < 80 * chunk
