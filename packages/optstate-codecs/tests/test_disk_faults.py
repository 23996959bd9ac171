"""A file that was cut off, and a disk that is full: nothing is lost, and what is said is clear."""

import errno
import gc
import json
import os
import resource

import pytest
import torch
from files import files, make, refused
from offloads import Pair, assert_alike, params, run
from torch.nn import Parameter

from optstate_codecs.errors import StepError
from optstate_codecs.offloading import manifest, offload


@pytest.fixture
def pair(path):
    return Pair(make, store="disk", path=path, chunk_bytes=9000).run(3)


def test_a_file_that_was_cut_off(pair, path):
    pair.optimizers[1].state.clear()  # nothing looks at what is no more
    before = [p.detach().clone() for p in pair.params[1]]
    size = path.stat().st_size
    os.truncate(path, size // 2)
    with pytest.raises(ValueError, match="cut off"):
        run(pair.params[1], pair.optimizers[1], 3)
    assert all(map(torch.equal, before, pair.params[1]))
    pair.optimizers = pair.optimizers[0], None
    gc.collect()
    refused(pair.params[1], make, path, "cut off")


def _no_room(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


EVERY = pytest.mark.thorough
#: how many regions there is room for, of the six that the first step asks for
ROOM = [5, *(pytest.param(n, marks=EVERY) for n in range(5))]
#: after how many calls the disk is full
AFTER = [0, 3, 11, *(pytest.param(n, marks=EVERY) for n in range(24) if n not in (0, 3, 11))]


@pytest.mark.parametrize("room", ROOM)
def test_a_full_disk_before_the_first_step(room, path, monkeypatch, record_property):
    optimizer = make(mine := params())
    monkeypatch.setattr(os, "posix_fallocate", _no_room)
    with pytest.raises(OSError, match="no room"):
        offload(optimizer, "disk", path=path)
    assert files(path) == []
    assert optimizer.offloaded is None
    monkeypatch.undo()
    pair = Pair(make)
    pair.params = pair.params[0], mine
    pair.optimizers = pair.optimizers[0], offload(optimizer, "disk", path=path, chunk_bytes=9000)
    real, sizes = os.posix_fallocate, []

    def some(file, start, size):
        sizes.append(size)
        return real(file, start, size) if len(sizes) <= room else _no_room()

    monkeypatch.setattr(os, "posix_fallocate", some)
    before = [p.detach().clone() for p in mine]
    grown = []
    for _ in range(3):
        with pytest.raises(OSError, match="no room"):
            run(mine, pair.optimizers[1], 0)
        grown.append(path.stat().st_size)
    assert all(map(torch.equal, before, mine))
    assert grown[0] == grown[1] == grown[2]
    monkeypatch.undo()
    pair.run(3).check()
    record_property("full disks", 4)


@pytest.mark.parametrize("call", ["pwrite", "replace", "write_text"])
@pytest.mark.parametrize("after", AFTER)
def test_a_disk_that_is_full_for_a_while(call, after, pair, path, monkeypatch, record_property):
    """Writes of state, or of the manifest, fail: steps say so, and lose nothing."""
    record_property("full disks", 1)
    owner = os if call == "pwrite" else type(path)
    real, calls = getattr(owner, call), []

    def full(*args):
        calls.append(1)
        return real(*args) if len(calls) <= after else _no_room()

    monkeypatch.setattr(owner, call, full)
    steps = 0
    error = None
    while error is None:
        try:
            run(pair.params[1], pair.optimizers[1], pair.time + steps, missing=False)
            steps += 1
        except (OSError, StepError) as found:
            error = found
        assert steps < 30
    assert "No space left" in str(error)
    with pytest.raises(OSError, match="No space left"):
        dict(pair.optimizers[1].state)
    # what is in the file now is the last whole step that the manifest has seen
    named = _as_named(path)
    monkeypatch.undo()
    for _ in range(steps):
        run(pair.params[0], pair.optimizers[0], pair.time, missing=False)
        pair.time += 1
    if isinstance(error, StepError):
        for index, ours in enumerate(pair.params[1]):
            assert index not in error.torn or ours.numel() > 1000
        for index in (*error.stepped, *error.torn):
            pair.params[1][index].grad = None
        pair.optimizers[1].step()
        run(pair.params[0], pair.optimizers[0], pair.time, missing=False)
        pair.time += 1
        whole = [i for i in range(7) if i not in error.torn]
    else:
        whole = list(range(7))
    both = [[ours[i] for i in whole] for ours in pair.params]
    assert_alike(both, pair.optimizers)
    assert named <= float(pair.time)
    pair.run(2)
    both = [[ours[i] for i in whole] for ours in pair.params]
    assert_alike(both, pair.optimizers)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_files_that_the_system_limits(part, pair, path, record_property):
    """No injection: the system itself refuses to write beyond so many bytes of a file."""
    room = int(part * path.stat().st_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    steps, error = 0, None
    try:
        while error is None and steps < 6:
            try:
                run(pair.params[1], pair.optimizers[1], pair.time + steps, missing=False)
                steps += 1
            except (OSError, StepError) as found:
                error = found
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in str(error), "the limit was never met"
    torn = getattr(error, "torn", [])
    for _ in range(steps + isinstance(error, StepError)):
        run(pair.params[0], pair.optimizers[0], pair.time, missing=False)
        pair.time += 1
    if isinstance(error, StepError):
        for index in (*error.stepped, *torn):
            pair.params[1][index].grad = None
        pair.optimizers[1].step()
    pair.run(2)
    both = [[ours[i] for i in range(len(ours)) if i not in torn] for ours in pair.params]
    assert_alike(both, pair.optimizers)
    record_property("full disks", 1)


def _as_named(path) -> float:
    """Step counts of what the manifest names, which are one."""
    content = json.loads(manifest.manifest_path(path).read_text())
    return max(entry["step"] for entry in content["parameters"])


def test_many_slabs_need_no_descriptor_each(path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    if before is None:
        pytest.skip("descriptors cannot be counted here")
    given = [Parameter(torch.ones(600)) for _ in range(300)]
    optimizer = offload(make(given), "disk", path=path, chunk_bytes=1)
    run(given, optimizer, 0, missing=False)
    assert len(optimizer.executor.placement.slabs) == 300
    assert len(os.listdir("/proc/self/fd")) <= before + 4
