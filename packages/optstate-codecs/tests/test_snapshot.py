"""State dicts that stay what they are while training goes on, and what memory that takes."""

import copy
import errno
import gc
import io
import os
import threading
import weakref
from functools import partial

import pytest
import torch
from files import files, reopened
from offloads import Pair, assert_alike, injected, params, run
from subjects import adam

from optstate_codecs import GradientRelease, snapshot
from optstate_codecs.engine import eager
from optstate_codecs.errors import StepError
from optstate_codecs.offloading import HostStateStore, StreamingExecutor, offload
from optstate_codecs.offloading.disk import DiskStateStore

EXACT = adam("fp32", "fp32", lr=0.01)
DYNAMIC = adam("dynamic8(units=update)", "dynamic8(signed=False, rounding=stochastic)", lr=0.01)
# slabs of several parameters, and one that is cut into chunks of a part each
SIZE = 9000


@pytest.fixture(params=["host", "disk", "resident", "beside"])
def anywhere(request, path):
    """Those of every store, and of resident state; None: not offloaded."""
    return {
        "host": {"store": "host"},
        "disk": {"store": "disk", "path": path},
        "resident": {"resident_bytes": 120_000},
        "beside": None,
    }[request.param]


def paired(make, where, size=SIZE):
    """Two optimizers, the second with its state there."""
    return Pair(make, chunk_bytes=size, **where) if where else Pair(make, offloaded=False)


def now(optimizer):
    """A copy of its state dict."""
    return copy.deepcopy(optimizer.state_dict())


def assert_same(first, second, where="state_dict"):
    """Raise unless two state dicts are bitwise equal, and lie the same way in memory."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert (first.dtype, first.stride()) == (second.dtype, second.stride()), where
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key, value in first.items():
            assert_same(value, second[key], f"{where}[{key!r}]")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for number, values in enumerate(zip(first, second, strict=True)):
            assert_same(*values, f"{where}[{number}]")
    else:
        assert first == second, where


class Counted:
    """How many memories stores have made since this was asked last."""

    def __init__(self, monkeypatch) -> None:
        self.calls = 0
        for store in (HostStateStore, DiskStateStore):
            monkeypatch.setattr(store, "new", self._counting(store.new))

    def _counting(self, real):
        def new(store, nbytes):
            self.calls += 1
            return real(store, nbytes)

        return new

    def since(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


@pytest.mark.parametrize("size", [SIZE, 1 << 25])
@pytest.mark.parametrize("make", [EXACT, DYNAMIC], ids=["fp32", "dynamic8"])
def test_stays_what_it_was(make, size, anywhere):
    pair = paired(make, anywhere, size).run(3)
    expected = now(pair.optimizers[1])
    with snapshot(pair.optimizers[1]) as taken:
        assert_same(taken.state_dict(), expected)
        for _ in range(3):
            # nothing asks for the state between these
            pair.run(1)
            assert_same(taken.state_dict(), expected)
        pair.check("with the snapshot")
        assert_same(taken.state_dict(), expected)
        pair.run(1).check("after a look")
        assert_same(taken.state_dict(), expected)
    pair.run(3).check("after it was closed")


def test_parameters_without_gradients_are_part_of_it(where):
    """Their slabs are not stepped, or only as others' that are in the same one."""
    pair = paired(EXACT, where).run(1, missing=False)
    expected = now(pair.optimizers[1])
    with snapshot(pair.optimizers[1]) as taken:
        for frozen in ([0, 1, 3], [2, 4, 5], [0]):
            for ours, optimizer in pair.each():
                for index, param in enumerate(ours):
                    param.requires_grad_(index not in frozen)
                run(ours, optimizer, pair.time, missing=False)
            pair.time += 1
            assert_same(taken.state_dict(), expected)
        pair.check()


def test_groups_and_counts_are_copies(anywhere):
    def make(given):
        groups = [{"params": given[:2], "lr": torch.tensor(0.1)}, {"params": given[2:]}]
        return EXACT(groups, fused=True)

    pair = paired(make, anywhere).run(2)
    expected = now(pair.optimizers[1])
    taken = snapshot(pair.optimizers[1])
    for _, optimizer in pair.each():
        optimizer.param_groups[0]["lr"].fill_(0.05)
        optimizer.param_groups[1]["betas"] = (0.5, 0.6)
    pair.run(2).check()
    assert_same(taken.state_dict(), expected)


@pytest.mark.parametrize("make", [EXACT, DYNAMIC], ids=["fp32", "dynamic8"])
def test_saved_in_a_thread_and_gone_on_from(make, anywhere):
    pair = paired(make, anywhere).run(3)
    expected, values = now(pair.optimizers[1]), [p.detach().clone() for p in pair.params[1]]
    begun, stepped = threading.Event(), threading.Event()

    class File(io.BytesIO):
        """Takes its first bytes before the steps, and the others after them."""

        def write(self, data):
            begun.set()
            assert stepped.wait(60)
            return super().write(data)

    file = File()
    with snapshot(pair.optimizers[1]) as taken:
        saving = threading.Thread(target=torch.save, args=(taken.state_dict(), file))
        saving.start()
        assert begun.wait(60)
        pair.run(3)
        stepped.set()
        saving.join()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert_same(saved, expected)
    # the file has the state once, not the memory that it is a part of
    assert file.tell() < 1.1 * sum(map(_bytes, saved["state"].values())) + 40_000
    for again in (make(params()), offload(make(params()), chunk_bytes=5000)):
        given = again.param_groups[0]["params"]
        for param, value in zip(given, values, strict=True):
            param.data.copy_(value)
        again.load_state_dict(saved)
        for time in range(3, 6):
            run(given, again, time)
        assert_alike((pair.params[0], given), (pair.optimizers[0], again))


def _bytes(state) -> int:
    return sum(value.nbytes for value in state.values())


def test_loads_without_being_saved(where):
    """Nothing of it is aliased by who loads it."""
    pair = paired(DYNAMIC, where).run(3)
    expected = now(pair.optimizers[1])
    with snapshot(pair.optimizers[1]) as taken:
        other = Pair(DYNAMIC, chunk_bytes=SIZE)
        for _, optimizer in (*other.each(), *pair.each()):
            optimizer.load_state_dict(taken.state_dict())
        del optimizer
        other.run(2).check()
        pair.run(2).check()
        assert_same(taken.state_dict(), expected)


def test_state_that_is_loaded_or_replaced_while_it_is_open(where):
    pair = paired(EXACT, where).run(2)
    early = now(pair.optimizers[0])
    pair.run(2)
    expected = now(pair.optimizers[1])
    taken = snapshot(pair.optimizers[1])
    for _, optimizer in pair.each():
        optimizer.load_state_dict(early)
    loaded, early = snapshot(pair.optimizers[1]), now(pair.optimizers[1])
    pair.run(2, missing=False)
    for ours, optimizer in pair.each():
        optimizer.state[ours[0]]["exp_avg"] = torch.ones_like(ours[0])
    replaced, latest = snapshot(pair.optimizers[1]), now(pair.optimizers[1])
    for ours, optimizer in pair.each():
        # it is no slab's yet
        optimizer.state[ours[0]]["exp_avg"].add_(1.0)
        del optimizer.state[ours[3]]
    del optimizer
    pair.run(2).check()
    for one, state_dict in ((taken, expected), (loaded, early), (replaced, latest)):
        assert_same(one.state_dict(), state_dict)


def test_without_state(anywhere):
    pair = paired(EXACT, anywhere)
    with snapshot(pair.optimizers[1]) as taken:
        pair.run(2).check()
        assert taken.state_dict()["state"] == {}


def test_several_at_once(anywhere):
    pair, kept = paired(DYNAMIC, anywhere).run(1), []
    for _ in range(3):
        pair.run(1)
        kept.append((snapshot(pair.optimizers[1]), now(pair.optimizers[1])))
    # twice the same moment
    kept.append((snapshot(pair.optimizers[1]), now(pair.optimizers[1])))
    pair.run(2)
    for closed in (1, 2, 0):
        for taken, expected in kept:
            assert_same(taken.state_dict(), expected)
        kept.pop(closed)[0].close()
        pair.run(2).check()
    assert_same(kept[0][0].state_dict(), kept[0][1])


def test_what_is_in_slabs_is_not_copied(where, counted):
    """Taking one makes no memory; steps make one for each slab that they change, and no more."""
    pair = paired(EXACT, where).run(2, missing=False)
    optimizer, ours = pair.optimizers[1], pair.params[1]
    slabs = len(optimizer.executor.placement.slabs)
    assert slabs > 2
    counted.since()
    taken = snapshot(optimizer)
    for number, param in enumerate(ours):
        for key, value in optimizer.state[param].items():
            if value.numel():
                held = taken.state_dict()["state"][number][key]
                assert (held.data_ptr() == value.data_ptr()) == (key != "step")
    assert counted.since() == 0
    for index, param in enumerate(ours):
        param.grad = torch.ones_like(param) if index == 2 else None
    # the first time, a file still has the memory that the manifest does not name
    for _ in range(3):
        optimizer.step()
    assert counted.since() == 1
    for time in range(3, 7):
        run(ours, optimizer, time, missing=False)
    assert counted.since() == slabs - 1
    taken.close()
    for time in range(7, 12):
        with snapshot(optimizer):
            run(ours, optimizer, time, missing=False)
            run(ours, optimizer, time + 1, missing=False)
    assert counted.since() == 0
    # two moments at once
    first = snapshot(optimizer)
    run(ours, optimizer, 20, missing=False)
    second, third = snapshot(optimizer), snapshot(optimizer)
    for time in range(21, 24):
        run(ours, optimizer, time, missing=False)
    assert counted.since() == slabs
    del first, second, third


def test_a_file_has_no_more_than_it_needs(tmp_path):
    path = tmp_path / "state"
    pair = paired(EXACT, {"store": "disk", "path": path}).run(2, missing=False)
    slabs, before = pair.optimizers[1].executor.placement.slabs, path.stat().st_size
    # regions begin at pages
    once = sum(-(-slab.nbytes // 4096) * 4096 for slab in slabs)
    assert before == 4096 + 2 * once
    for _ in range(3):
        with snapshot(pair.optimizers[1]):
            assert path.stat().st_size in (before, before + once)
            pair.run(3, missing=False)
            assert path.stat().st_size == before + once
    del slabs
    reopened(pair, EXACT, path).check()
    with snapshot(pair.optimizers[1]):
        pair.run(3, missing=False).check()
        # the memory that was made before is known to who goes on
        assert path.stat().st_size == before + once
    assert files(path) == ["state", "state.json"]


def test_a_full_disk(tmp_path, monkeypatch):
    pair = paired(DYNAMIC, {"store": "disk", "path": tmp_path / "state"}).run(2, missing=False)
    taken, expected = snapshot(pair.optimizers[1]), now(pair.optimizers[1])
    injected(monkeypatch, os, "posix_fallocate", 2, partial(OSError, errno.ENOSPC))
    pair.run(1, missing=False)
    before = [p.detach().clone() for p in pair.params[1]]
    with pytest.raises(OSError, match="no room"):
        run(pair.params[1], pair.optimizers[1], pair.time, missing=False)
    monkeypatch.undo()
    assert all(map(torch.equal, before, pair.params[1]))
    pair.check("nothing has changed")
    pair.run(1, missing=False).check("there is room now")
    assert_same(taken.state_dict(), expected)


def test_another_goes_on_from_the_file_while_it_is_open(tmp_path):
    """The manifest names whole steps, whatever memory they are in."""
    path = tmp_path / "state"
    pair = paired(DYNAMIC, {"store": "disk", "path": path}).run(3)
    for _ in range(4):
        with snapshot(pair.optimizers[1]):
            pair.run(3)
            reopened(pair, DYNAMIC, path).check()


@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_step_that_fails(at, where, monkeypatch):
    # nothing is cut, so that no parameter is torn
    pair = paired(adam("int8", "fp32", lr=0.01, backend="eager"), where, 200_000)
    pair.run(2, missing=False)
    expected, taken = now(pair.optimizers[1]), snapshot(pair.optimizers[1])
    injected(monkeypatch, eager, "_step_param", at)
    with pytest.raises(StepError) as info:
        run(pair.params[1], pair.optimizers[1], 2, missing=False)
    monkeypatch.undo()
    assert len(info.value.stepped) == at
    assert_same(taken.state_dict(), expected)
    run(pair.params[0], pair.optimizers[0], 2, missing=False)
    for index in info.value.stepped:
        pair.params[1][index].grad = None
    pair.optimizers[1].step()
    pair.time = 3
    pair.check("stepped in two")
    pair.run(2).check("gone on")
    assert_same(taken.state_dict(), expected)


@pytest.mark.parametrize("at", [2, 6])
def test_a_step_that_fails_within_a_parameter(at, where, monkeypatch):
    """It leaves what it leaves where no snapshot is open: what was not reached comes along."""
    pair = paired(adam("fp32", "fp32", lr=0.01, backend="eager"), where)
    offload(pair.optimizers[0], chunk_bytes=SIZE)
    pair.run(2, missing=False)
    expected, taken = now(pair.optimizers[1]), snapshot(pair.optimizers[1])
    for ours, optimizer in pair.each():
        injected(monkeypatch, eager, "_step_param", at)
        with pytest.raises(StepError) as info:
            run(ours, optimizer, 2, missing=False)
        monkeypatch.undo()
        assert info.value.torn
    del optimizer
    pair.check("failed")
    pair.run(2).check("gone on")
    assert_same(taken.state_dict(), expected)


def test_during_gradient_release(where):
    """Parameters are stepped during backward, each in a step of its own."""
    pair = paired(EXACT, where)

    def step():
        for ours, optimizer in pair.each():
            sum(((p * (pair.time + 1.0)) ** 2).sum() for p in ours).backward()
            optimizer.step()
            optimizer.zero_grad()
        pair.time += 1

    with GradientRelease(pair.optimizers[1], bucket_bytes=1):
        step()
        expected, taken = now(pair.optimizers[1]), snapshot(pair.optimizers[1])
        for _ in range(3):
            step()
        assert_same(taken.state_dict(), expected)
    pair.check()


def test_closed():
    pair = paired(EXACT, {"store": "host"}).run(1)
    taken = snapshot(pair.optimizers[1])
    with taken as same:
        assert same is taken
    with pytest.raises(ValueError, match="closed"):
        taken.state_dict()
    another = snapshot(pair.optimizers[1])
    taken.close()
    expected = now(pair.optimizers[1])
    pair.run(2)
    assert_same(another.state_dict(), expected)


def test_one_that_is_dropped_is_closed(where, counted):
    pair = paired(EXACT, where).run(2, missing=False)
    counted.since()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            taken = snapshot(pair.optimizers[1])
            del taken
            pair.run(2, missing=False)
    finally:
        gc.enable()
    assert counted.since() == 0


def test_outlives_the_optimizer_and_keeps_only_its_memory(where):
    gc.collect()
    gc.disable()
    try:
        optimizer = offload(DYNAMIC(params()), chunk_bytes=SIZE, **where)
        ours = optimizer.param_groups[0]["params"]
        for time in range(3):
            run(ours, optimizer, time)
        expected, taken = now(optimizer), snapshot(optimizer)
        for time in range(3, 6):
            run(ours, optimizer, time)
        stream = optimizer.executor
        assert isinstance(stream, StreamingExecutor)
        memories = [memory for slab in stream.placement.slabs for memory in slab.family]
        held = [weakref.ref(memory) for memory in memories if memory.holders]
        free = [weakref.ref(memory) for memory in memories if not memory.holders]
        assert len(held) == len(stream.placement.slabs)
        free += [weakref.ref(one) for one in (optimizer, stream, stream.store)]
        del stream, memories, optimizer
        assert [reference for reference in free if reference() is not None] == []
        assert_same(taken.state_dict(), expected)
        taken.close()
        assert [reference for reference in held if reference() is not None] == []
    finally:
        gc.enable()


def test_of_no_optimizer_of_the_family():
    with pytest.raises(TypeError, match="packed_state_dict"):
        snapshot(torch.optim.SGD(params()))


@pytest.mark.cuda
@pytest.mark.parametrize("store", ["host", "disk", "resident"])
def test_on_a_gpu(store, tmp_path):
    """Steps are asked for without waiting; what the snapshot holds is not written meanwhile."""

    def build():
        shapes = ((300, 700), (50,), (1290, 257), (5,), (64, 9, 3))
        return [p.detach().cuda().requires_grad_() for p in params(shapes=shapes)]

    where = {
        "host": {},
        "disk": {"store": "disk", "path": tmp_path / "state"},
        "resident": {"resident_bytes": 500_000},
    }[store]
    pair = Pair(DYNAMIC, build, chunk_bytes=100_000, **where).run(3)
    expected = now(pair.optimizers[0])
    with snapshot(pair.optimizers[1]) as taken:
        tensors = [v for s in taken.state_dict()["state"].values() for v in s.values()]
        assert all(value.device.type == "cpu" for value in tensors)
        pair.run(5)
        torch.cuda.synchronize()
        for number, state in expected["state"].items():
            for key, value in state.items():
                assert torch.equal(taken.state_dict()["state"][number][key], value.cpu()), key
    pair.run(3)
    for mine, yours in zip(*pair.params, strict=True):
        assert torch.equal(mine, yours)
