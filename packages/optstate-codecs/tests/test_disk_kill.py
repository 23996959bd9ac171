"""A process that is killed at any time leaves a whole step in its file."""

import os
import random
import signal
import time
from collections import deque

import pytest
import torch
from files import forked, make
from offloads import params, run

from optstate_codecs.offloading import Snapshot, offload, snapshot

SHAPES = ((300, 70), (50,), (129, 140), (0,), (9, 3), ())
KILLS = [20, pytest.param(100, marks=pytest.mark.thorough)]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def _rate(number: int) -> float:
    return 0.01 / (1 + number % 7)


def _step(given, optimizer, number: int) -> None:
    """Step ``number``, whose gradients and learning rate depend on nothing else."""
    optimizer.param_groups[0]["lr"] = _rate(number)
    run(given, optimizer, number)


class Oracle:
    """The same steps with the state beside the parameters, remembered as long as it matters."""

    def __init__(self) -> None:
        self.params = params(shapes=SHAPES)
        self.optimizer = make(self.params)
        self.steps: list[tuple[list[torch.Tensor], list[dict]]] = []
        self._remember()

    def _remember(self) -> None:
        states = [
            {key: value.clone() for key, value in self.optimizer.state.get(p, {}).items()}
            for p in self.params
        ]
        self.steps.append(([p.detach().clone() for p in self.params], states))

    def after(self, number: int) -> tuple[list[torch.Tensor], list[dict]]:
        while len(self.steps) <= number:
            _step(self.params, self.optimizer, len(self.steps) - 1)
            self._remember()
        return self.steps[number]


def _slow(owner, name: str, most: float) -> None:
    """Have a call take some time or other, so that what must wait for it shows whether it does."""
    real = getattr(owner, name)

    def call(*arguments):
        time.sleep(random.random() ** 3 * most)
        return real(*arguments)

    setattr(owner, name, call)


def _train(path, begin: int, given, resume: bool, held: int, said: int) -> None:
    """Step until killed, and say after each step whose manifest is written how many there are.

    Snapshots are taken every other step; as many as ``held`` are open at a time.
    """
    optimizer = offload(make(given), "disk", path=path, resume=resume, chunk_bytes=9000)
    taken: deque[Snapshot] = deque(maxlen=held)
    for number in range(begin, 10_000):
        _step(given, optimizer, number)
        if held and number % 2:
            taken.append(snapshot(optimizer))
        if number % 3 == 2:
            # all of it is in the file then
            optimizer.state  # noqa: B018
            os.write(said, (number + 1).to_bytes(8, "little"))


def _killed(after: float, *arguments) -> int:
    """Train in a process of its own that is killed; the last number of steps that it said."""

    def work(pipe: int) -> None:
        _slow(os, "pwrite", 0.02)
        _slow(type(arguments[0]), "replace", 0.04)
        _train(*arguments, pipe)

    child, reads = forked(work)
    first = os.read(reads, 8)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = first
    while more := os.read(reads, 8):
        said = more
    os.close(reads)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    return int.from_bytes(said, "little")


@pytest.mark.parametrize("kills", KILLS)
def test_killed_at_any_time(kills, tmp_path, record_property):
    path, oracle, moments = tmp_path / "state", Oracle(), random.Random(5)
    done, exact = 0, 0
    ended: list[int] = []
    for kill in range(kills):
        given = params(shapes=SHAPES)
        for param, value in zip(given, oracle.after(done)[0], strict=True):
            param.data.copy_(value)
        said = _killed(moments.uniform(0.0, 0.1), path, done, given, kill > 0, kill % 3)
        again = offload(make(params(shapes=SHAPES)), "disk", path=path, resume=True)
        states = list(again.state.items())
        counts = [int(state["step"]) for _, state in states]
        # a parameter misses every fifth gradient, so the counts tell the steps but for one
        found = [
            number
            for number in range(max(said, done), said + 60)
            if _same(oracle.after(number)[1], again)
        ]
        assert found, f"kill {kill}: counts {counts} are of no whole step from {said} on"
        ended.append(found[0])
        done, exact = found[0], exact + 1
        # that of the step, or what was set for the next where that had begun
        assert again.param_groups[0]["lr"] in (_rate(done - 1), _rate(done))
        del again, states
    assert exact == kills
    assert ended == sorted(ended)
    assert ended[-1] >= kills
    record_property("kills made", kills)
    record_property("kills survived", exact)


def _same(states: list[dict], optimizer) -> bool:
    """Whether an optimizer's state is that, bit for bit."""
    given = optimizer.param_groups[0]["params"]
    for state, param in zip(states, given, strict=True):
        mine = optimizer.state.get(param, {})
        if mine.keys() != state.keys():
            return False
        if not all(torch.equal(value, mine[key]) for key, value in state.items()):
            return False
    return True
