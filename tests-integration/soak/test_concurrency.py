"""Optimizers in several threads, in a forked process, and at the end of the interpreter."""

import os
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch

from optstate_codecs import offload
from soak.test_leaks import OFFLOADED, SUBJECTS, run, small

LIMIT = 120


def stepped(name, store, folder, steps):
    """Parameters and decoded state after some steps, as bytes."""
    params, optimizer = small(SUBJECTS[name])
    if store != "device":
        offload(optimizer, store, **({"path": folder / name} if store == "disk" else {}))
    run(params, optimizer, steps)
    return result(params, optimizer)


def result(params, optimizer):
    states = [sorted(optimizer.state[param].items(), key=str) for param in params]
    return pickle.dumps(
        [
            [bits(param) for param in params],
            [[(key, bits(value)) for key, value in state] for state in states],
        ]
    )


def bits(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("steps", [20, pytest.param(500, marks=pytest.mark.thorough)])
def test_threads_that_step_at_once(steps, tmp_path, record_property):
    """Different optimizers, resident and offloaded; every bit is that of steps one by one."""
    jobs = [(name, "device") for name in SUBJECTS] if steps > 20 else []
    jobs += [(name, store) for name in list(OFFLOADED)[::4] for store in ("device", "host", "disk")]
    expected = {}
    for job in jobs:
        folder = tmp_path / f"alone-{job[1]}"
        folder.mkdir(exist_ok=True)
        expected[job] = stepped(*job, folder, steps)
    found, errors = {}, []
    start = threading.Barrier(4)

    def work(mine):
        start.wait()
        for job in mine:
            folder = tmp_path / f"together-{job[1]}"
            folder.mkdir(exist_ok=True)
            try:
                found[job] = stepped(*job, folder, steps)
            except Exception as error:
                errors.append((job, error))

    threads = [threading.Thread(target=work, args=(jobs[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found.keys() == expected.keys()
    assert [job for job in jobs if found[job] != expected[job]] == []
    record_property("steps in threads", steps * len(jobs))


def in_child(work):
    """What ``work`` returns or raises in a forked process, which must end in time."""
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        # some versions warn of the threads that there are
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            try:
                said = "result", work()
            except Exception as error:
                said = "error", f"{type(error).__name__}: {error}"
            with os.fdopen(writes, "wb") as file:
                pickle.dump(said, file)
        finally:
            os._exit(0)
    os.close(writes)
    killer = threading.Timer(LIMIT, os.kill, (child, 9))
    killer.start()
    try:
        with os.fdopen(reads, "rb") as file:
            said = file.read()
    finally:
        _, status = os.waitpid(child, 0)
        killer.cancel()
    assert status == 0, "the child did not end by itself"
    return pickle.loads(said)


def places(names, lean):
    return [pytest.param(n, marks=() if n in lean else pytest.mark.thorough) for n in names]


@pytest.mark.parametrize("store", ["device", "host", "disk"])
@pytest.mark.parametrize("name", places(SUBJECTS, ("lowbit_adam.AdamW8bit",)))
def test_a_forked_process_steps_or_says_why_not(name, store, tmp_path, record_property):
    """It steps as the first process would, or raises; the first process steps as without it."""
    if store != "device" and name not in OFFLOADED:
        store = "device"
    params, optimizer = small(SUBJECTS[name])
    if store != "device":
        offload(optimizer, store, **({"path": tmp_path / "state"} if store == "disk" else {}))
    run(params, optimizer, 3)

    def work():
        run(params, optimizer, 3)
        return result(params, optimizer)

    kind, said = in_child(work)
    run(params, optimizer, 3)
    assert result(params, optimizer) == stepped(name, "device", tmp_path, 6) or store != "device"
    if store == "disk":
        assert kind == "error"
        assert "was forked from" in said
    else:
        assert kind == "result", said
        assert said == result(params, optimizer)
    record_property("forks", 1)


SCRIPT = """
    import os, random, sys, threading, time
    from pathlib import Path
    from soak.test_leaks import OFFLOADED, run, small
    from optstate_codecs import offload, snapshot

    real, random = os.pwrite, random.Random(int(sys.argv[2]))

    def slow(*given):
        time.sleep(random.random() * 0.02)
        return real(*given)

    os.pwrite = slow
    params, optimizer = small(OFFLOADED["lowbit_adam.AdamW8bit"])
    path = Path(sys.argv[1])
    offload(optimizer, "disk", path=path, chunk_bytes=64, resume=path.exists())
    if sys.argv[3] == "thread":
        # the main thread ends while another steps
        work = lambda: run(params, optimizer, 12)
        threading.Thread(target=work, daemon=False).start()
    else:
        run(params, optimizer, random.randrange(1, 12))
        kept = snapshot(optimizer) if sys.argv[3] == "snapshot" else None
        optimizer.step()
    if sys.argv[3] == "exit":
        sys.exit(0)
"""


EVERY = [(way, 5) for way in ("end", "exit", "snapshot", "thread")]


@pytest.mark.parametrize(
    ("way", "times"),
    [("end", 1), ("thread", 1), *(pytest.param(*e, marks=pytest.mark.thorough) for e in EVERY)],
)
def test_the_interpreter_ends_while_state_is_written(way, times, tmp_path, record_property):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    path, before = tmp_path / "state", 0.0
    for number in range(times):
        given = [sys.executable, "-W", "error", script, path, str(number), way]
        ended = subprocess.run(given, capture_output=True, text=True, timeout=LIMIT)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
        params, optimizer = small(OFFLOADED["lowbit_adam.AdamW8bit"])
        offload(optimizer, "disk", path=path, resume=True, chunk_bytes=64)
        count = max(float(optimizer.state[param]["step"]) for param in params)
        assert count >= before + 2
        before = count
        del optimizer
    record_property("exits", times)
