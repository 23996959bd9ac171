"""State on the host is stored in slabs that are made once, and comes back as it was."""

import copy
from unittest import mock

import pytest
import torch

from optstate_codecs import GradientRelease
from optstate_codecs.state.layout import view_bytes_as
from optstate_wrap import ConfigurablePolicy, wrap
from optstate_wrap.offload import slabs, transfers

SHAPES = ((20, 33), (7,), (900,), (3, 3), (0, 4), (20, 33))
CODED = {"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)"}


def run_of(problem, policy=None, cls=torch.optim.AdamW, **options):
    def make(groups):
        inner = cls(groups, lr=1e-2, **options)
        return wrap(inner, policy or ConfigurablePolicy({}), 256, store="host", fused=False)

    return problem(make, shapes=SHAPES)


def step(run) -> None:
    """A step in which every parameter has a gradient."""
    run.set_gradients()
    for param in run.params:
        if param.grad is None:
            param.grad = torch.ones_like(param)
    run.optimizer.step()


@pytest.mark.parametrize("codecs", [{}, CODED], ids=["exact", "coded"])
def test_slabs_are_made_once(problem, codecs) -> None:
    run = run_of(problem, ConfigurablePolicy(codecs))
    for _ in range(2):
        step(run)
    store = run.optimizer.engine.store
    with mock.patch.object(slabs, "empty_pinned", side_effect=AssertionError("made")):
        for _ in range(3):
            before = memories(run)
            step(run)
            assert memories(run) != before  # what is stored was not written over
    sizes = {slab.memory.numel() for slab in kept_slabs(run)}
    split = sum(slab.memory.numel() for slab in slabs_of(run, 2))
    assert store.spares.nbytes <= sum(sizes) + split


def slabs_of(run, number):
    records = run.optimizer.engine.store.records(run.params[number])
    return {slab for record in records for slab in record.slabs}


def kept_slabs(run):
    return set().union(*(slabs_of(run, number) for number in range(len(run.params))))


def memories(run) -> list[int]:
    return sorted(slab.memory.data_ptr() for slab in kept_slabs(run))


@pytest.mark.parametrize("kept", [{}, CODED], ids=["exact", "coded"])
def test_the_host_has_no_byte_more_than_the_records(problem, kept) -> None:
    run = run_of(problem, ConfigurablePolicy(kept)).run(8)
    for slab in kept_slabs(run):
        records = [
            record
            for param in run.params
            if param in run.optimizer.engine.store
            for record in run.optimizer.engine.store.records(param)
            if slab in record.slabs
        ]
        assert slab.records == len(records)


def test_one_slab_is_spare_of_a_size_that_comes_and_goes(problem) -> None:
    run = problem(
        lambda g: wrap(torch.optim.NAdam(g), ConfigurablePolicy({}), 4096, store="host"),
        shapes=((20, 33), (900,)),
    )

    def alternate(steps):
        for number in range(steps):
            step(run)
            if number % 2:
                run.params[1].grad = None
                run.optimizer.step()

    alternate(4)
    with mock.patch.object(slabs, "empty_pinned", side_effect=AssertionError("made")):
        alternate(6)


def test_slabs_whose_size_is_not_wanted_go(problem) -> None:
    run = run_of(problem, ConfigurablePolicy(CODED, warmup_steps=2))
    free = run.optimizer.engine.store.spares._free
    for _ in range(3):
        step(run)
    sizes = {slab.memory.numel() for slab in kept_slabs(run)}
    left = [nbytes for (nbytes, _), spare in free.items() for _ in spare if nbytes not in sizes]
    assert len(left) == len(set(left))
    for _ in range(slabs.PATIENCE):
        step(run)
    assert {nbytes for (nbytes, _), spare in free.items() if spare} <= sizes


def test_what_the_engine_takes_over_leaves_no_slab(problem) -> None:
    run = problem(
        lambda groups: wrap(
            torch.optim.AdamW(groups, lr=1e-2),
            ConfigurablePolicy(CODED, warmup_steps=2),
            store="host",
        ),
        shapes=((600,), (900,)),
    )
    for _ in range(4 + slabs.PATIENCE):
        step(run)
    store = run.optimizer.engine.store
    assert run.optimizer.engine.fused._prepared
    assert not kept_slabs(run)
    assert not store.spares.nbytes


def test_released_gradients_step_the_same(problem, same) -> None:
    ours, theirs = run_of(problem, cls=torch.optim.NAdam), run_of(problem, cls=torch.optim.NAdam)

    def loss(run):
        return sum((param * (n + param)).sum() for n, param in enumerate(run.params))

    release = GradientRelease(ours.optimizer, bucket_bytes=1 << 11)
    with release:
        for _ in range(5):
            for run in (ours, theirs):
                loss(run).backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
    same(ours, theirs)


def test_rows_come_ahead_in_at_most_three_slots(problem, monkeypatch) -> None:
    run = run_of(problem)
    step(run)
    calls = []
    for name in ("load", "enter", "store"):
        real = getattr(transfers.StateRing, name)

        def noted(self, *args, name=name, real=real):
            calls.append(name)
            return real(self, *args)

        monkeypatch.setattr(transfers.StateRing, name, noted)
    step(run)
    rows = calls.count("enter")
    assert rows > 4
    assert calls.count("load") == calls.count("store") == rows
    assert calls[:5] == ["load"] * 3 + ["enter", "store"]
    assert calls[5 : 5 + 3 * (rows - 3)] == ["load", "enter", "store"] * (rows - 3)


class Replacing(torch.optim.SGD):
    """Makes new state tensors in every step, and more of them later."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in (p for p in group["params"] if p.grad is not None):
                state = self.state[param]
                mean = state.get("a", torch.zeros_like(param)) * 0.9 + param.grad
                count = state.get("count", 0) + 1
                older = {"b": state["a"]} if count > 2 else {}
                # what was second comes first
                self.state[param] = {**older, "a": mean, "count": count}
                param -= group["lr"] * (mean + state.get("b", 0))


def test_state_that_is_replaced_or_moves_is_stored(problem, same) -> None:
    plain = problem(lambda groups: Replacing(groups, lr=1e-2), shapes=SHAPES)
    ours = run_of(problem, cls=Replacing)
    for _ in range(4):
        same(plain.run(2), ours.run(2))


@pytest.mark.parametrize("cls", [torch.optim.NAdam, torch.optim.Adagrad, torch.optim.Adam])
def test_reading_copying_and_setting_state_between_steps(problem, same, cls) -> None:
    plain = problem(lambda groups: cls(groups, lr=1e-2), shapes=SHAPES)
    ours = run_of(problem, cls=cls)
    for turn in range(4):
        same(plain.run(2), ours.run(2))
        if turn == 1:
            ours.make = None
            ours = copy.deepcopy(ours)
        elif turn == 2:
            state = ours.optimizer.state
            for param in list(state):
                state[param] = state[param]


def test_runs_are_copied_at_once_and_nothing_between_them() -> None:
    device = torch.device("cpu")
    slab = slabs.RecordSlab(torch.arange(160, dtype=torch.uint8), device)
    inside = [view_bytes_as(slab.memory, 16 * n, torch.empty(3)) for n in range(8)]
    alone = torch.full((3,), 7.0)
    items = [transfers.Item(tensor, slab) for tensor in inside]
    items = [*items[:2], transfers.Item(alone, None), *items[2:4], items[6], items[5]]
    offsets, nbytes = slabs.pack([item.tensor for item in items])
    room = torch.zeros(nbytes, dtype=torch.uint8)
    found = list(transfers._runs(room, items, offsets))
    assert [source.numel() for source, _ in found] == [3, 28, 28, 12, 12]
    ring = transfers.StateRing(device)
    slot = ring.load(items)
    for item in items:
        assert torch.equal(slot.views[id(item.tensor)], item.tensor)
