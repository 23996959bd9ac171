"""On a GPU, state that comes from the host and goes back: bits, waiting, memory, allocations."""

import copy
from unittest import mock

import pytest
import torch
from torch.nn import Parameter

from optstate_wrap import ConfigurablePolicy, OffloadOptimizer, StepError
from optstate_wrap.offload import slabs
from optstate_wrap.step import chunked, transaction

pytestmark = pytest.mark.cuda

SHAPES = ((700, 333), (5,), (128, 256), (0, 3), (1 << 18,), (33, 1000))
CODED = {"exp_avg": "int8(block_size=128)", "exp_avg_sq": "oneq(bits=8,block_size=128)"}
OPTIMIZERS = {
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW single": (torch.optim.AdamW, {"foreach": False, "amsgrad": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW capturable": (torch.optim.AdamW, {"capturable": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adafactor": (torch.optim.Adafactor, {}),
}


def params(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=generator).to("cuda", dtype)) for s in shapes]


def set_gradients(of, step, missing=False) -> None:
    generator = torch.Generator("cuda").manual_seed(step)
    for number, param in enumerate(of):
        grad = torch.randn(param.shape, generator=generator, device="cuda").to(param)
        param.grad = None if missing and step and (step + number) % 4 == 2 else grad


def busy() -> None:
    """Keep the current stream at work for a while, so that what does not wait for it shows."""
    torch.cuda._sleep(20_000_000)


@pytest.fixture(params=OPTIMIZERS, ids=lambda name: name.replace(" ", "-"))
def make(request):
    cls, options = OPTIMIZERS[request.param]
    shapes = [s for s in SHAPES if 0 not in s or cls is not torch.optim.Adafactor]
    return lambda of: cls(of, lr=1e-2, **options), shapes


# which is not so on every version of torch; bits are the same either way
@pytest.mark.filterwarnings("ignore:Adagrad cannot be stepped in chunks")
@pytest.mark.parametrize("chunk_size", [8192, 100_000, 1 << 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_is_the_unwrapped_optimizer(make, dtype, chunk_size) -> None:
    """Over steps with gradients that come and go, and with a device that lags behind the host."""
    inner, shapes = make
    plain, ours = params(dtype, shapes), params(dtype, shapes)
    theirs = inner(plain)
    wrapped = OffloadOptimizer(inner(ours), chunk_size=chunk_size, fused=False)
    for step in range(12):
        for some, optimizer in ((plain, theirs), (ours, wrapped)):
            set_gradients(some, step, missing=True)
            if step % 3:
                busy()
            optimizer.step()
        if step in (4, 5, 9):
            for mine, yours in zip(ours, plain, strict=True):
                state, expected = wrapped.state[mine], theirs.state[yours]
                assert state.keys() == expected.keys()
                for key, value in expected.items():
                    assert state[key] is value or torch.equal(state[key].cpu(), value.cpu()), key
    assert all(map(torch.equal, plain, ours))


@pytest.mark.parametrize("chunk_size", [8192, 100_000])
def test_coded_is_the_device_store(chunk_size) -> None:
    policy = ConfigurablePolicy(CODED, warmup_steps=3)
    found = []
    for store in ("device", "host"):
        ours = params()
        inner = torch.optim.AdamW(ours, lr=1e-2, foreach=True)
        wrapped = OffloadOptimizer(inner, policy, store, chunk_size=chunk_size, fused=False)
        for step in range(12):
            set_gradients(ours, step, missing=True)
            busy()
            wrapped.step()
        found.append([*ours, *(wrapped.state[p]["exp_avg"] for p in ours)])
    assert all(map(torch.equal, *found))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("state", [None, CODED], ids=["exact", "coded"])
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_a_step_neither_waits_for_the_device_nor_locks_memory(options, state) -> None:
    ours = params()
    inner = torch.optim.AdamW(ours, **options)
    wrapped = OffloadOptimizer(inner, state, chunk_size=8192, fused=False)
    for step in range(4):
        set_gradients(ours, step)
        wrapped.step()
    set_gradients(ours, 4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with mock.patch.object(slabs, "empty_pinned", side_effect=AssertionError("made")):
            wrapped.step()
            wrapped.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_stores_trail_the_step() -> None:
    """What ``step`` has asked for is under way when it returns, and there when somebody looks."""
    ours, theirs = params(shapes=[(1 << 20,)] * 8), params(shapes=[(1 << 20,)] * 8)
    plain = torch.optim.AdamW(theirs, fused=True)
    wrapped = OffloadOptimizer(torch.optim.AdamW(ours, fused=True), chunk_size=1 << 20)
    for step in range(4):
        for some, optimizer in ((theirs, plain), (ours, wrapped)):
            set_gradients(some, step)
            torch.cuda.synchronize()
            torch.cuda._sleep(1_000_000_000)
            optimizer.step()
    after = torch.cuda.Event()
    after.record()
    assert not after.query()
    for mine, yours in zip(reversed(ours), reversed(theirs), strict=True):
        kept = wrapped.engine.store.records(mine)[0]["exp_avg"].tensor.clone()
        assert torch.equal(kept, plain.state[yours]["exp_avg"].cpu())


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_memory_of_a_step_is_three_rows(options) -> None:
    """160 Mi parameters, some of one chunk and some of more, by the default chunk."""
    numels = [1 << 20] * 10 + [1 << 23] * 8 + [11 << 20] * 2 + [1 << 26]
    ours = [Parameter(torch.randn(numel, device="cuda")) for numel in numels]
    set_gradients(ours, 0)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    wrapped = OffloadOptimizer(torch.optim.AdamW(ours, **options))
    for _ in range(3):
        wrapped.step()
    torch.cuda.synchronize()
    slots = 3 * 8 << 23
    assert torch.cuda.memory_allocated() - held < slots + (8 << 20)
    torch.cuda.reset_peak_memory_stats()
    wrapped.step()
    assert torch.cuda.max_memory_allocated() - held < 420 << 20


@pytest.mark.parametrize("undo_bytes", [0, 1 << 30], ids=["undone from the host", "undone there"])
@pytest.mark.parametrize("number", range(5))
def test_an_exception_leaves_what_was_stored(number, undo_bytes, monkeypatch) -> None:
    """In whichever row it is raised; afterwards all goes on as it would have."""
    monkeypatch.setattr(transaction, "UNDO_BYTES", undo_bytes)
    ours, theirs = params(), params()
    wrapped = OffloadOptimizer(torch.optim.AdamW(ours, lr=1e-2), chunk_size=100_000, fused=False)
    plain = torch.optim.AdamW(theirs, lr=1e-2)
    real, calls = chunked.unhooked_step, iter(range(1 << 20))

    def failing(inner):
        if next(calls) == number:
            raise MemoryError("boom")
        return real(inner)

    for step in range(6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        busy()
        plain.step()
        if step != 3:
            wrapped.step()
            continue
        with (
            mock.patch.object(chunked, "unhooked_step", failing),
            pytest.raises(StepError) as caught,
        ):
            wrapped.step()
        for done in caught.value.stepped:
            ours[done].grad = None
        wrapped.step()
    assert all(map(torch.equal, theirs, ours))


def test_copies_go_on_equally() -> None:
    ours = params()
    wrapped = OffloadOptimizer(torch.optim.NAdam(ours, lr=1e-2), chunk_size=8192)
    for step in range(3):
        set_gradients(ours, step)
        busy()
        wrapped.step()
    both = [(ours, wrapped), copy.deepcopy((ours, wrapped))]
    for step in range(3, 8):
        for some, optimizer in both:
            set_gradients(some, step)
            optimizer.step()
    assert all(map(torch.equal, both[0][0], both[1][0]))
