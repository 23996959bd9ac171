"""A step that fails part of the way: what is said of it is true, and training goes on from it."""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch
from files import make
from offloads import Fault, Pair, gradient, injected, params, run
from subjects import adam

from optstate_codecs.engine import eager
from optstate_codecs.errors import StepError
from optstate_codecs.offloading import offload
from optstate_codecs.offloading.disk import DiskStateStore
from optstate_codecs.offloading.ring import Ring
from optstate_codecs.offloading.store import HostStateStore

SHAPES = ((300, 70), (50,), (129, 257), (5,), (0,), (64, 9, 3), (), (40, 40), (3000,), (2, 4))
STORES = {"host": HostStateStore, "disk": DiskStateStore}
#: the numbers of the calls that fail; None: each, in a step of its own
CALLS = [0, 7, pytest.param(None, marks=pytest.mark.thorough, id="every")]
FORMATS = {
    "fp32": ("fp32", "fp32"),
    "dynamic8": ("dynamic8(units=update)", "dynamic8(signed=False, rounding=stochastic)"),
}


class Watched:
    """An optimizer with offloaded state, and what a step makes of each element of it."""

    def __init__(self, formats, **where) -> None:
        def make(given):
            return adam(*FORMATS[formats], lr=0.01, backend="eager")(given)

        self.params = params(shapes=SHAPES)
        self.optimizer = make(self.params)
        if where.get("store") != "device":
            offload(self.optimizer, chunk_bytes=9000, **where)
        for time in range(2):
            run(self.params, self.optimizer, time, missing=False)
        self.before = self.snapshot()
        ours, plain = params(shapes=SHAPES), None
        plain = make(ours)
        plain.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        for mine, theirs in zip(ours, self.params, strict=True):
            mine.data.copy_(theirs.data)
        run(ours, plain, 2, missing=False)
        self.after = [self._of(plain, mine) for mine in ours]

    @staticmethod
    def _of(optimizer, param) -> dict:
        found = {key: value.clone() for key, value in optimizer.state[param].items()}
        return {"param": param.detach().clone(), **found}

    def snapshot(self) -> list[dict]:
        return [self._of(self.optimizer, param) for param in self.params]

    def fail(self, error=StepError) -> Exception:
        for index, param in enumerate(self.params):
            param.grad = gradient(2, index, param, missing=False)
        with pytest.raises(error) as info:
            self.optimizer.step()
        return info.value

    def check(self, said: StepError | None) -> None:
        """Raise unless every parameter is before or after its step, with its state, as is said."""
        now, torn, stepped, unstepped = self.snapshot(), [], [], []
        for index, (old, new, found) in enumerate(zip(self.before, self.after, now, strict=True)):
            same = [all(torch.equal(found[k], s[k]) for k in s) for s in (new, old)]
            if same[0]:
                stepped.append(index)
            elif same[1]:
                unstepped.append(index)
            else:
                torn.append(index)
                for key in set(found) - {"step"}:
                    part = (found[key] == new[key]) | (found[key] == old[key])
                    assert part.all(), f"parameter {index}: {key} is neither"
                at = (found["param"] == new["param"]).flatten()
                border = int(at.long().argmin())
                assert border % 8192 == 0, f"parameter {index}: torn at {border}"
                assert not at[border:].all()
                if "exp_avg" in found:
                    moved = (found["exp_avg"] == new["exp_avg"]).flatten()
                    assert torch.equal(moved, at), f"parameter {index}: not its state"
        if said is not None:
            assert (said.stepped, said.unstepped, said.torn) == (stepped, unstepped, torn)

    def resume(self, said: StepError) -> None:
        """Step what was not, and see that all is then as if nothing had happened."""
        for index in (*said.stepped, *said.torn):
            self.params[index].grad = None
        self.optimizer.step()
        for index, (new, found) in enumerate(zip(self.after, self.snapshot(), strict=True)):
            if index not in said.torn:
                for key, value in new.items():
                    assert torch.equal(value, found[key]), f"parameter {index}: {key}"


#: what fails, by phase: where it is (None: in the store), its name, and whether it works before
PHASES = {
    "load": (Ring, "_load", False),
    "loaded": (Ring, "_load", True),
    "source": (None, "source", False),
    "step": (eager, "_step_param", False),
    "slice": (eager, "step_slice", False),
    "leave": (Ring, "leave", False),
    "left": (Ring, "leave", True),
    "sink": (None, "sink", False),
    "reserve": (None, "reserve", False),
    "stored": (None, "stored", False),
    "thread": (ThreadPoolExecutor, "submit", False),
}
PLACES = [
    (store, phase)
    for store, phases in {
        "device": ("step", "slice"),
        "host": [phase for phase in PHASES if phase != "thread"],
        "disk": PHASES,
    }.items()
    for phase in phases
]


@pytest.mark.parametrize("at", CALLS)
@pytest.mark.parametrize(("store", "phase"), PLACES)
def test_faults(store, phase, at, tmp_path, monkeypatch, record_property):
    made = 0
    for number in count() if at is None else (at,):
        where = {"path": tmp_path / f"state-{number}"} if store == "disk" else {}
        if not _fault(phase, number, {"store": store, **where}, monkeypatch):
            break
        made += 1
    assert made or at is not None
    record_property("faults injected", made)


def _fault(phase, at, where, monkeypatch) -> bool:
    """One fault, and all that must hold after it; whether there was such a call."""
    owner, name, after = PHASES[phase]
    watched = Watched("dynamic8", **where)
    # that a thread cannot be started is a RuntimeError
    kind = RuntimeError if phase == "thread" else Fault
    raised = injected(monkeypatch, owner or STORES[where["store"]], name, at, kind, after=after)
    for index, param in enumerate(watched.params):
        param.grad = gradient(2, index, param, missing=False)
    said = None
    try:
        watched.optimizer.step()
    except StepError as error:
        said = error
    except Fault as error:
        # nothing has changed
        said = StepError("", (), range(len(SHAPES)))
        said.__cause__ = error
        assert where["store"] == "device"
    monkeypatch.undo()
    if said is None:
        # a load ahead of its time is not missed, and a step may have fewer calls than that
        assert not raised or phase in ("load", "loaded", "source", "thread")
    else:
        assert isinstance(said.__cause__, Fault)
    watched.check(said or StepError("", range(len(SHAPES)), ()))
    if said is not None:
        watched.resume(said)
    return bool(raised)


@pytest.mark.parametrize("store", ["device", "host"])
def test_a_parameter_is_torn_between_slices(store, monkeypatch):
    """The reference steps 65,536 elements at once; what it has begun is neither old nor new."""
    mine = params(shapes=((40,), (70_000,), (30,)))
    optimizer = make(mine) if store == "device" else offload(make(mine), store)
    run(mine, optimizer, 0, missing=False)
    before = [p.detach().clone() for p in mine]
    injected(monkeypatch, eager, "step_slice", 2)
    with pytest.raises(StepError, match="injected") as info:
        run(mine, optimizer, 1, missing=False)
    assert (info.value.stepped, info.value.torn, info.value.unstepped) == ([0], [1], [2])
    assert not (before[0] == mine[0]).any()
    assert not (before[1] == mine[1])[:65_536].all()
    assert torch.equal(before[1][65_536:], mine[1][65_536:])
    assert torch.equal(before[2], mine[2])


@pytest.mark.parametrize("at", [0, 7])
def test_no_memory_for_what_a_step_makes(at, where, monkeypatch):
    """It is asked for before anything changes."""
    watched = Watched("dynamic8", **where)
    injected(monkeypatch, STORES[where["store"]], "target", at)
    watched.fail(Fault)
    monkeypatch.undo()
    nothing = StepError("", (), range(len(SHAPES)))
    watched.check(nothing)
    watched.resume(nothing)


@pytest.mark.parametrize("phase", ["load", "step", "leave", "sink", "stored"])
@pytest.mark.parametrize("at", [0, 3])
def test_interrupts(phase, at, where, monkeypatch):
    owner, name, after = PHASES[phase]
    watched = Watched("fp32", **where)
    injected(monkeypatch, owner or STORES[where["store"]], name, at, KeyboardInterrupt, after)
    watched.fail(KeyboardInterrupt)
    monkeypatch.undo()
    watched.check(None)
    run(watched.params, watched.optimizer, 3, missing=False)
    assert all(bool(p.isfinite().all()) for p in watched.params)


def test_what_cannot_be_stored_for_a_while_is_not_lost(where, monkeypatch):
    """The store refuses everything from one chunk on, until it is asked after the step."""
    store = STORES[where["store"]]
    watched, real, calls = Watched("dynamic8", **where), store.sink, count()

    def full(self, chunk):
        if next(calls) >= 2:
            raise OSError(28, "No space left on device")
        return real(self, chunk)

    monkeypatch.setattr(store, "sink", full)
    said = watched.fail()
    assert said.unstepped
    with pytest.raises(OSError, match="No space"):
        watched.optimizer.step()
    monkeypatch.undo()
    watched.check(said)
    watched.resume(said)


@pytest.mark.parametrize("resident", [100_000, 1 << 30])
def test_what_stays_on_the_device(resident, monkeypatch):
    watched = Watched("fp32", resident_bytes=resident)
    injected(monkeypatch, eager, "_step_param", 3)
    said = watched.fail()
    monkeypatch.undo()
    watched.check(said)
    watched.resume(said)


@pytest.mark.parametrize("fused", [False, True])
def test_a_torn_parameter_goes_on_with_the_counts_of_its_parts(fused, monkeypatch):
    """A part that missed a step is where it would be had its gradient been missing."""
    pair = Pair(adam("fp32", "fp32", lr=0.01, fused=fused, backend="eager"), chunk_bytes=9000)
    pair.run(2, missing=False)
    (_, optimizer), large = list(pair.each())[1], pair.params[1][2]
    injected(monkeypatch, eager, "_step_param", 7)
    with pytest.raises(StepError) as info:
        run(pair.params[1], optimizer, 2, missing=False)
    monkeypatch.undo()
    assert info.value.torn == [2]
    assert info.value.stepped == [0]
    # as many elements of the large one as have been stepped, by an optimizer of their own
    pieces = [p.detach().clone() for p in large.flatten().split(8192)]
    states = [optimizer.state[large][k].flatten().split(8192) for k in ("exp_avg", "exp_avg_sq")]
    done = [(pair.params[0][2].flatten().split(8192)[n] != p).any() for n, p in enumerate(pieces)]
    assert any(done)
    assert not all(done)
    plain = torch.optim.Adam(pieces, lr=0.01)
    for n, piece in enumerate(pieces):
        moments = {"exp_avg": states[0][n].clone(), "exp_avg_sq": states[1][n].clone()}
        plain.state[piece] = {"step": torch.tensor(2.0 + float(done[n])), **moments}
    for time in (3, 4):
        large.grad = None
        run(pair.params[1][:2], optimizer, time, missing=False)  # others in between
        run(pair.params[1], optimizer, time, missing=False)
        parts = gradient(time, 2, large, missing=False).flatten().split(8192)
        for piece, part in zip(pieces, parts, strict=True):
            piece.grad = part
        plain.step()
        assert torch.equal(torch.cat(pieces), large.flatten())
