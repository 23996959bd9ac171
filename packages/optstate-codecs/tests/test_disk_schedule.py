"""A file goes on with the learning rates that a scheduler has set, wherever the process ended."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from files import files, forked
from offloads import gradient, params
from subjects import EXACT
from torch.optim import lr_scheduler

from optstate_codecs import Adam, CodedOptimizer, synchronize
from optstate_codecs.offloading import disk, offload

SHAPES = ((40, 30), (50,), ())
STEPS, STOP = 9, 4
SCHEDULES = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7, eta_min=1e-3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
    # betas go up and down with it
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=STEPS + 2),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.25, total_iters=5), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[6],
    ),
}
CHAINED = {"cosine", "exponential", "one cycle", "warm-up"}


def make(given, **options):
    return CodedOptimizer(given, Adam(), EXACT, lr=0.1, backend="eager", **options)


def fresh() -> list[torch.nn.Parameter]:
    return params(shapes=SHAPES)


def train(given, optimizer, schedule, begin: int, end: int) -> list[tuple]:
    """What each step's learning rate and betas are."""
    seen = []
    for step in range(begin, end):
        (group,) = optimizer.param_groups
        seen.append((group["lr"], tuple(group["betas"])))
        for index, param in enumerate(given):
            param.grad = gradient(step, index, param, missing=False)
        optimizer.step()
        schedule.step()
    return seen


def said(path) -> list[dict]:
    """The groups as the manifest has them."""
    return json.loads(path.with_name("state.json").read_text())["param_groups"]


@pytest.fixture(params=SCHEDULES)
def name(request):
    return request.param


@pytest.fixture
def exact(name):
    """torch's optimizer, never interrupted: rates, and parameters at the end."""
    given = fresh()
    optimizer = torch.optim.Adam(given, lr=0.1, foreach=False)
    return train(given, optimizer, SCHEDULES[name](optimizer), 0, STEPS), given


def begin(name: str, path, saved):
    """Train until STOP, and save what is the user's to save."""
    given = fresh()
    optimizer = offload(make(given), "disk", path=path)
    schedule = SCHEDULES[name](optimizer)
    seen = train(given, optimizer, schedule, 0, STOP)
    torch.save({"params": given, "schedule": schedule.state_dict(), "seen": seen}, saved)
    return optimizer, given, schedule


def go_on(name: str, path, saved, exact) -> None:
    """Raise unless the rest of the training is as if there had been no interruption."""
    # without weights_only: some schedulers' states hold functions or counters
    kept = torch.load(saved, weights_only=False)
    given = kept["params"]
    optimizer = make(given)
    schedule = SCHEDULES[name](optimizer)
    offload(optimizer, "disk", path=path, resume=True)
    schedule.load_state_dict(kept["schedule"])
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(schedule_base(name))
    seen = kept["seen"] + train(given, optimizer, schedule, STOP, STEPS)
    rates, expected = exact
    assert seen == rates
    assert len({rate for rate, _ in rates}) > 3
    for mine, theirs in zip(given, expected, strict=True):
        assert torch.equal(mine, theirs)


def schedule_base(name: str) -> float:
    return 0.05 / 25 if name == "one cycle" else 0.1


def test_dropped_after_the_schedulers_step(name, path, tmp_path, exact) -> None:
    optimizer, _, schedule = begin(name, path, tmp_path / "saved")
    del optimizer, schedule
    go_on(name, path, tmp_path / "saved", exact)


@pytest.mark.parametrize("look", ["synchronize", "state", "state_dict"])
def test_the_manifest_says_what_groups_hold_after(look, path, tmp_path) -> None:
    optimizer, _, schedule = begin("cosine", path, tmp_path / "saved")
    if look == "synchronize":
        synchronize(optimizer)
    elif look == "state":
        assert optimizer.state
    else:
        optimizer.state_dict()
    (group,) = said(path)
    assert group["lr"] == optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
    assert group["initial_lr"] == 0.1
    assert files(path) == ["saved", "state", "state.json"]


def test_a_manifest_that_is_right_is_not_written_again(path, tmp_path, monkeypatch) -> None:
    optimizer, given, schedule = begin("lambda", path, tmp_path / "saved")
    optimizer.executor.store.wait()
    written = []
    write = disk.write_manifest
    monkeypatch.setattr(disk, "write_manifest", lambda *a: (written.append(1), write(*a)))
    synchronize(optimizer)
    assert len(written) == 1
    synchronize(optimizer)
    optimizer.state_dict()
    assert len(written) == 1
    # one for the step, none for values that have stayed; one more where a scheduler has set some
    for param in given:
        param.grad = torch.ones_like(param)
    optimizer.step()
    synchronize(optimizer)
    assert len(written) == 2
    schedule.step()
    optimizer.step()
    synchronize(optimizer)
    assert len(written) == 4


def test_a_rate_that_is_a_tensor_is_noticed(path) -> None:
    given = fresh()
    rate = torch.tensor(0.1)
    optimizer = CodedOptimizer(given, Adam(), EXACT, lr=rate, backend="eager")
    offload(optimizer, "disk", path=path)
    for param in given:
        param.grad = torch.ones_like(param)
    optimizer.step()
    rate.fill_(0.25)
    synchronize(optimizer)
    (group,) = said(path)
    assert group["lr"] == 0.25


def test_a_group_that_is_new_is_said_with_its_state(path, tmp_path) -> None:
    optimizer, given, _ = begin("lambda", path, tmp_path / "saved")
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.5})
    synchronize(optimizer)
    assert len(said(path)) == 1
    for param in given:
        param.grad = torch.ones_like(param)
    optimizer.step()
    synchronize(optimizer)
    assert len(said(path)) == 2


def test_values_that_are_loaded_wait_for_the_state_loaded_with_them(path, tmp_path) -> None:
    optimizer, given, schedule = begin("cosine", path, tmp_path / "saved")
    early = copy.deepcopy(optimizer.state_dict())
    early["param_groups"][0]["lr"] = 0.75
    train(given, optimizer, schedule, STOP, STOP + 1)
    rate = schedule.get_last_lr()[0]

    optimizer.load_state_dict(early)
    synchronize(optimizer)
    assert said(path)[0]["lr"] == rate
    del optimizer, schedule
    assert said(path)[0]["lr"] == rate

    optimizer = offload(make(given), "disk", path=path, resume=True)
    optimizer.load_state_dict(early)
    for param in given:
        param.grad = torch.ones_like(param)
    optimizer.step()
    synchronize(optimizer)
    assert said(path)[0]["lr"] == 0.75


def test_a_manifest_that_cannot_be_written_is_tried_again(path, tmp_path, monkeypatch) -> None:
    optimizer, given, schedule = begin("cosine", path, tmp_path / "saved")
    synchronize(optimizer)
    schedule.step()
    write = disk.write_manifest

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "write_manifest", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            synchronize(optimizer)
    for param in given:
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in given]
    with pytest.raises(OSError, match="No space left"):
        optimizer.step()
    assert all(map(torch.equal, given, before))
    monkeypatch.setattr(disk, "write_manifest", write)
    synchronize(optimizer)
    (group,) = said(path)
    assert group["lr"] == schedule.get_last_lr()[0]


def test_a_scheduler_may_be_made_from_a_later_epoch(path, tmp_path) -> None:
    def shape(epoch: int) -> float:
        return 1 / (epoch + 1)

    optimizer, _, schedule = begin("lambda", path, tmp_path / "saved")
    rate = schedule.get_last_lr()
    del optimizer, schedule
    optimizer = offload(make(fresh()), "disk", path=path, resume=True)
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    again = lr_scheduler.LambdaLR(optimizer, shape, last_epoch=STOP - 1)
    assert again.get_last_lr() == rate


def killed(work) -> None:
    """Do it in a process of its own, and kill that when it says so, which it waits for."""
    child, reads = forked(lambda pipe: work(lambda: (os.write(pipe, b"x"), signal.pause())))
    said = os.read(reads, 1)
    os.close(reads)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert said == b"x", "the child ended by itself"
    assert os.WIFSIGNALED(status)


@pytest.mark.parametrize("when", ["after synchronize", "in the next step"])
def test_killed_after_the_schedulers_step(when, name, path, tmp_path, exact) -> None:
    def work(die) -> None:
        optimizer, given, schedule = begin(name, path, tmp_path / "saved")
        if when == "after synchronize":
            synchronize(optimizer)
            die()
        write = os.pwrite
        # of the first step's writes some may still be under way
        optimizer.executor.store.wait()
        os.pwrite = lambda *arguments: (write(*arguments), die())
        train(given, optimizer, schedule, STOP, STOP + 1)
        optimizer.state  # noqa: B018
        raise AssertionError("nothing was written")

    killed(work)
    go_on(name, path, tmp_path / "saved", exact)


PROGRAM = """
import ctypes, pathlib, sys
sys.path.insert(0, {tests!r})
import test_disk_schedule as tests
optimizer, given, schedule = tests.begin({name!r}, pathlib.Path({path!r}), {saved!r})
# as what a hook of autograd holds, which nothing collects as the process ends
ctypes.pythonapi.Py_IncRef(ctypes.py_object(optimizer))
raise KeyboardInterrupt
"""


def test_the_end_of_the_process_is_no_kill(path, tmp_path) -> None:
    given, saved, tests = fresh(), tmp_path / "saved", os.path.dirname(__file__)
    program = PROGRAM.format(tests=tests, name="cosine", path=str(path), saved=str(saved))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "Exception ignored" not in done.stderr
    optimizer = torch.optim.Adam(given, lr=0.1, foreach=False)
    exact = train(given, optimizer, SCHEDULES["cosine"](optimizer), 0, STEPS), given
    go_on("cosine", path, saved, exact)
