"""Thousands of steps hold no more memory, handles and threads than a few."""

import itertools
from functools import partial

import pytest
import torch
from suite.configurations import configurations
from torch.nn import Parameter

from optstate_codecs import offload, snapshot
from soak.resources import growth, held, traced_growth

#: the first configuration of each public optimizer; other names of one are not run again
FIRST = [
    next(group) for _, group in itertools.groupby(configurations(), lambda found: found.public.name)
]
SUBJECTS = {one.name: one for one in FIRST if one.public.base is None}
#: those that ``offload`` takes: it is one of the public functions itself
OFFLOADED = {
    name: one for name, one in SUBJECTS.items() if one.coded and one.public.takes == "params"
}
THOROUGH = pytest.mark.thorough
STORES = [pytest.param("host", marks=THOROUGH), "disk"]
SHAPES = ((17, 24), (24,))
WARM_UP = 60
# bytes; an object from before that a step replaces counts as new, which ``held`` does not do
TRACED = 16 << 10
#: one of each kind of state; all of them run in the session ``soak``
LEAN = ("optstate_wrap.CPUOffloadOptimizer", "turboadam.TurboAdam")


def lengths(names, lean, lean_steps, steps):
    whole = [pytest.param(name, steps, marks=THOROUGH) for name in names]
    return [pytest.param(name, lean_steps) for name in lean] + whole


def small(configuration, **options):
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params, configuration.make(params, **options)


def run(params, optimizer, steps):
    """Steps as of a training loop: gradients in new memory from time to time, some missing."""
    for number in range(steps):
        if number % 50 == 0:
            for param in params:
                param.grad = torch.full_like(param, 0.1 + number % 7)
        if number % 100 == 99:
            params[-1].grad = None
        optimizer.step()
        if number % 500 == 250:
            optimizer.load_state_dict(optimizer.state_dict())


def held_steady(params, optimizer, steps, work=run):
    work(params, optimizer, WARM_UP)
    work(params, optimizer, WARM_UP)
    before = held()
    work(params, optimizer, steps)
    assert not growth(before, held())
    assert traced_growth(partial(work, params, optimizer, WARM_UP)) < TRACED
    assert all(bool(param.isfinite().all()) for param in params)
    return steps


@pytest.mark.parametrize(("name", "steps"), lengths(SUBJECTS, LEAN, 300, 10_000))
def test_steps(name, steps, record_property):
    made = held_steady(*small(SUBJECTS[name]), steps)
    record_property("steps", made)
    record_property("optimizers", 1)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("name", "steps"), lengths(OFFLOADED, ["lowbit_adam.AdamW8bit"], 100, 1_000)
)
def test_offloaded_steps(name, steps, store, tmp_path, record_property):
    """With a snapshot that is taken and closed now and then."""
    params, optimizer = small(OFFLOADED[name])
    offload(optimizer, store, **({"path": tmp_path / "state"} if store == "disk" else {}))

    def work(params, optimizer, steps):
        for _ in range(0, steps, 20):
            with snapshot(optimizer):
                run(params, optimizer, 20)
        # tasks that have ended are kept until then
        optimizer.state  # noqa: B018

    made = held_steady(params, optimizer, steps, work)
    record_property("offloaded steps", made)
    record_property("offloaded optimizers", 1)


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=THOROUGH)])
@pytest.mark.parametrize("store", [pytest.param("device", marks=THOROUGH), *STORES])
def test_optimizers_that_come_and_go(store, rounds, tmp_path, record_property):
    def one(number):
        params, optimizer = small(SUBJECTS["lowbit_adam.AdamW8bit"])
        if store != "device":
            path = {"path": tmp_path / f"state-{number}"} if store == "disk" else {}
            offload(optimizer, store, **path)
        run(params, optimizer, 3)

    for number in range(3):
        one(number)
    before = held()
    for number in range(3, 3 + rounds):
        one(number)
    assert not growth(before, held())
    record_property("optimizers made and dropped", rounds + 3)
