"""What is written to a wrapped optimizer's state has the effect that it has with torch.optim."""

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs import GradientRelease
from optstate_wrap import ConfigurablePolicy, OffloadOptimizer, wrap
from optstate_wrap.state import decoded

SHAPES = ((20, 33), (300,), (3, 5, 7), ())
CODED = {"exp_avg": "int8", "exp_avg_sq": "bf16(rounding=nearest)"}
UNITS = {"exp_avg": "int8(units=update)", "exp_avg_sq": "oneq(bits=8)"}
#: policy, chunk, and what steps coded state: parts of tensors, and whole ones
KINDS = {
    "exact": ({}, 256, False),
    "exact-whole": ({}, 1 << 20, False),
    "coded": (CODED, 256, False),
    "coded-fused": (CODED, 256, None),
    "coded-fused-whole": (CODED, 1 << 20, None),
    "update-units": (UNITS, 256, False),
    "update-units-fused": (UNITS, 1 << 20, None),
}


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, foreach=False)


class Pair:
    """A wrapped optimizer and a plain one in the very same state, after some steps."""

    def __init__(self, kind: str = "exact", store: str = "device", shapes=SHAPES) -> None:
        codecs, chunk, fused = KINDS[kind]
        self.exact, self.fused = not codecs, fused is None
        generator = torch.Generator().manual_seed(0)
        starts = [torch.randn(shape, generator=generator) for shape in shapes]
        self.mine, self.theirs = ([Parameter(s.clone()) for s in starts] for _ in range(2))
        self.ours = wrap(
            adamw(self.mine), ConfigurablePolicy(codecs), chunk, store=store, fused=fused
        )
        self.plain = adamw(self.theirs)
        self.count = 0
        for _ in range(3):
            self.gradients(self.mine)
            self.ours.step()
            self.count += 1
        self.plain.load_state_dict(copy.deepcopy(self.ours.state_dict()))
        for a, b in zip(self.mine, self.theirs, strict=True):
            b.data.copy_(a)

    def gradients(self, params) -> None:
        generator = torch.Generator().manual_seed(100 + self.count)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)

    def each(self, action) -> None:
        """Do the same to the state of every parameter of both."""
        for optimizer, params in ((self.ours, self.mine), (self.plain, self.theirs)):
            with torch.no_grad():
                for param in params:
                    action(optimizer.state, param)

    def step(self) -> None:
        for optimizer, params in ((self.ours, self.mine), (self.plain, self.theirs)):
            self.gradients(params)
            optimizer.step()
        self.count += 1

    def check(self) -> None:
        for a, b in zip(self.mine, self.theirs, strict=True):
            if self.fused:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(a, b)


def zero(state, param) -> None:
    state[param]["exp_avg"] = torch.zeros_like(param)


def zero_in_place(state, param) -> None:
    state[param]["exp_avg"].zero_()


def zero_second_in_place(state, param) -> None:
    state[param]["exp_avg_sq"].zero_()


def zero_part(state, param) -> None:
    state[param]["exp_avg"].view(-1)[::2] = 0
    state[param]["exp_avg"].mul_(0)


def zero_all(state, param) -> None:
    for value in state[param].values():
        value.zero_()


def update(state, param) -> None:
    state[param].update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))


def step_alone(state, param) -> None:
    state[param]["step"] = torch.tensor(7.0)


def step_in_place(state, param) -> None:
    state[param]["step"].fill_(7.0)


def whole(state, param) -> None:
    zeros = torch.zeros_like(param)
    state[param] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def whole_then_more(state, param) -> None:
    mine = {"step": torch.tensor(3.0)}
    state[param] = mine
    mine["exp_avg"] = torch.zeros_like(param)
    mine["exp_avg_sq"] = torch.zeros_like(param)


def cleared(state, param) -> None:
    state[param].clear()


def popped(state, param) -> None:
    for key in list(state[param]):
        state[param].pop(key)


def deleted(state, param) -> None:
    del state[param]


def twice(state, param) -> None:
    first, second = state[param], state[param]
    first["exp_avg"].zero_()
    assert not second["exp_avg"].any()
    second["exp_avg_sq"] = torch.zeros_like(param)
    assert not first["exp_avg_sq"].any()


def foreign(state, param) -> None:
    slow = state[param].setdefault("slow", torch.zeros_like(param))
    assert state[param]["slow"] is slow
    before = slow.clone()
    slow.add_(1)
    assert torch.equal(state[param]["slow"], before + 1)


WRITES = (
    zero,
    zero_in_place,
    zero_second_in_place,
    zero_part,
    zero_all,
    update,
    step_alone,
    step_in_place,
    whole,
    whole_then_more,
    cleared,
    popped,
    deleted,
    twice,
    foreign,
)


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_has_its_effect(write, kind, store) -> None:
    if write is zero_second_in_place and kind.startswith("update-units"):
        pytest.skip("in units of a root of zero, every first moment is zero")
    pair = Pair(kind, store)
    pair.each(write)
    pair.step()
    pair.check()
    for param, theirs in zip(pair.mine, pair.theirs, strict=True):
        mine, other = pair.ours.state[param], pair.plain.state[theirs]
        assert mine.keys() == other.keys()
        for key in mine.keys() - {"exp_avg", "exp_avg_sq"}:
            assert torch.equal(mine[key], other[key])
    if pair.exact:
        for _ in range(2):
            pair.each(write)
            pair.step()
        pair.check()


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("whole", [False, True])
def test_any_numbers_may_be_written_to_exact_state(whole, store) -> None:
    pair = Pair("exact-whole" if whole else "exact", store)

    def write(state, param) -> None:
        generator = torch.Generator().manual_seed(pair.count)
        state[param]["exp_avg"] = torch.randn(param.shape, generator=generator)
        state[param]["exp_avg_sq"].mul_(0.5).add_(1e-3)

    for _ in range(3):
        pair.each(write)
        pair.step()
    pair.check()


def saved_by(how: str, optimizer, params):
    """The state of every parameter as something else sees it that uses the state."""
    if how == "unwrap":
        optimizer = optimizer.unwrap()
    elif how in ("deepcopy", "pickle"):
        both = (optimizer, params)
        both = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
        optimizer, params = both
    else:
        twins = [Parameter(param.detach().clone()) for param in params]
        twin = wrap(adamw(twins), optimizer.policy, 256)
        twin.load_state_dict(getattr(optimizer, how)())
        optimizer, params = twin, twins
    return [optimizer.state[param] for param in params]


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("kind", ["exact", "exact-whole", "coded", "coded-fused", "update-units"])
@pytest.mark.parametrize("how", ["unwrap", "deepcopy", "pickle", "state_dict", "packed_state_dict"])
def test_what_was_written_is_saved(how, kind, store) -> None:
    pair = Pair(kind, store)
    pair.each(zero_in_place)
    for number, state in enumerate(saved_by(how, pair.ours, pair.mine)):
        assert not state["exp_avg"].any()
        assert torch.equal(state["step"], pair.plain.state[pair.theirs[number]]["step"])
        second = pair.plain.state[pair.theirs[number]]["exp_avg_sq"]
        # what state_dict has decoded is encoded again
        rtol = 0.02 if how == "state_dict" and not pair.exact else 0
        torch.testing.assert_close(state["exp_avg_sq"], second, rtol=rtol, atol=0)


def codes(optimizer) -> dict[str, Tensor]:
    """Every coded component, by where it is."""
    found = {}
    for number, state in optimizer.packed_state_dict()["state"].items():
        for part, record in enumerate(state["parts"]):
            for key, value in record.items():
                for place, tensor in enumerate(value["parts"] if isinstance(value, dict) else ()):
                    found[f"{number} {part} {key} {place}"] = tensor
    return found


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("kind", ["coded", "coded-fused", "update-units", "update-units-fused"])
def test_what_nobody_changed_keeps_its_bits(kind, store, monkeypatch) -> None:
    pair = Pair(kind, store)
    before = codes(pair.ours)
    calls = []
    real = decoded.reencode
    monkeypatch.setattr(decoded, "reencode", lambda *args: calls.append(args) or real(*args))
    for param in pair.mine:
        state = pair.ours.state[param]
        pair.ours.state[param] = state
        state["exp_avg"] = state["exp_avg"]
        state["exp_avg"].sum()
    assert all(map(torch.equal, codes(pair.ours).values(), before.values()))
    assert not calls
    pair.ours.state[pair.mine[0]]["exp_avg"].zero_()
    after = codes(pair.ours)
    assert calls
    for where, tensor in after.items():
        if not where.startswith("0 ") or "exp_avg_sq" in where:
            assert torch.equal(tensor, before[where]), where
    # a change of what it is divided by leaves a first moment what it was
    first = pair.ours.state[pair.mine[1]]["exp_avg"].clone()
    pair.ours.state[pair.mine[1]]["exp_avg_sq"].mul_(4)
    pair.ours.state_dict()
    pair.ours.engine.states.discard_read_states()
    again = pair.ours.state[pair.mine[1]]["exp_avg"]
    torch.testing.assert_close(again, first, rtol=0.02, atol=0.02 * float(first.abs().max()))


def test_a_step_does_nothing_for_what_was_only_read(monkeypatch) -> None:
    pair = Pair("coded")
    for param in pair.mine:
        pair.ours.state[param]["exp_avg"].sum()
    cls = decoded.DecodedStates
    real, calls = cls._store, []
    monkeypatch.setattr(cls, "_store", lambda *args: calls.append(1) or real(*args))
    pair.step()
    assert not calls
    # and keeps nothing of it
    assert not pair.ours.engine.states._read_states


@pytest.mark.parametrize("kind", ["exact", "coded", "coded-fused"])
def test_parts_of_a_step_see_what_was_written(kind) -> None:
    pair = Pair(kind)
    pair.each(zero_in_place)
    pair.gradients(pair.theirs)
    pair.plain.step()
    pair.gradients(pair.mine)
    grads = [param.grad for param in pair.mine]
    for param in pair.mine:
        param.grad = None
    with GradientRelease(pair.ours, bucket_bytes=0):
        sum((p * grad).sum() for p, grad in zip(pair.mine, grads, strict=True)).backward()
        pair.ours.step()
    pair.check()


@pytest.mark.parametrize("kind", ["coded", "exact"])
def test_under_inference_mode(kind) -> None:
    pair = Pair(kind)
    with torch.inference_mode():
        pair.each(zero_in_place)
    pair.step()
    pair.check()
    with torch.inference_mode():
        read = [pair.ours.state[param] for param in pair.mine]
    # outside, what was read there may be changed too
    pair.each(zero_in_place)
    assert not any(state["exp_avg"].any() for state in read)
    pair.step()
    assert all(pair.ours.state[param]["step"] == 5 for param in pair.mine)


@pytest.mark.parametrize("resident", [0, 1 << 12, 1 << 20])
@pytest.mark.parametrize("kind", ["exact", "coded", "coded-fused-whole"])
def test_offload_optimizer(kind, resident) -> None:
    pair = Pair(kind)
    codecs, chunk, fused = KINDS[kind]
    mine = [Parameter(param.detach().clone()) for param in pair.mine]
    options = {"chunk_size": chunk, "fused": fused, "resident_bytes": resident}
    ours = OffloadOptimizer(adamw(mine), codecs, **options)
    ours.load_state_dict(pair.ours.packed_state_dict())
    pair.ours, pair.mine = ours, mine
    pair.each(zero_in_place)
    pair.step()
    pair.check()
    pair.each(whole)
    pair.each(foreign)
    for a, b in zip(pair.mine, pair.theirs, strict=True):
        b.data.copy_(a)
    pair.step()
    pair.check()


class Lookahead:
    """Every third step, parameters go half the way from where they were, as others write it."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer
        self.count = 0

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.count += 1
        if self.count % 3:
            return
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                slow = self.optimizer.state[param].setdefault("slow", torch.zeros_like(param))
                slow.add_(param - slow, alpha=0.5)
                param.copy_(slow)


class SAM:
    """Gradients of where the loss is worst nearby; keeps where it was in the state."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def step(self, gradients) -> None:
        params = self.optimizer.param_groups[0]["params"]
        gradients(params)
        for param in params:
            self.optimizer.state[param]["old_p"] = param.detach().clone()
            param.add_(param.grad, alpha=0.05)
        gradients(params)
        for param in params:
            param.copy_(self.optimizer.state[param]["old_p"])
        self.optimizer.step()


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_lookahead_and_sam(kind, store) -> None:
    pair = Pair(kind, store)
    before = [param.detach().clone() for param in pair.mine]
    for optimizer in (pair.ours, pair.plain):
        for group in optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        sam = SAM(optimizer)
        for _ in range(4):
            sam.step(pair.gradients)
    assert all(map(torch.equal, pair.mine, before))
    assert all(map(torch.equal, pair.theirs, before))
    for optimizer, params in ((pair.ours, pair.mine), (pair.plain, pair.theirs)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        lookahead = Lookahead(optimizer)
        for count in range(7):
            pair.count = count
            pair.gradients(params)
            lookahead.step()
    for a, b in zip(pair.mine, pair.theirs, strict=True):
        apart = 0 if pair.exact else 2e-2  # of seven steps of 0.01, with coded state
        torch.testing.assert_close(a, b, rtol=0, atol=apart)
        mine, theirs = pair.ours.state[a], pair.plain.state[b]
        assert mine.keys() == theirs.keys()
        for key in ("slow", "old_p"):
            torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=apart)


def test_the_mapping_is_torch_s() -> None:
    pair = Pair("coded")
    other = Parameter(torch.ones(3))
    for optimizer, params in ((pair.ours, pair.mine), (pair.plain, pair.theirs)):
        state, param = optimizer.state, params[0]
        assert state.get(other) is None
        mine = {"step": torch.tensor(1.0)}
        assert state.setdefault(param, mine) is state[param]
        assert state.pop(other, 5) == 5
        assert param in state
        assert other not in state
        assert len(state) == len(params)
        assert state.pop(param)["step"] == 3
        assert param not in state
        state[param] = mine
        assert state[param] is mine
        optimizer.state = {param: mine}
        assert list(optimizer.state) == [param]
        optimizer.state.clear()
        assert not optimizer.state
    with pytest.raises(TypeError, match="state: of a parameter must be a dict, got int"):
        pair.ours.state = {pair.mine[0]: 3}


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("fused", [None, False])
def test_state_that_is_taken_over_in_parts_counts_each_step_once(store, fused) -> None:
    """Every part of a tensor has a step count of its own."""
    start = torch.randn(700, generator=torch.Generator().manual_seed(0))
    params = [Parameter(start.clone()) for _ in range(2)]
    plain, ours = map(adamw, ([params[0]], [params[1]]))
    for step in range(6):
        if step == 2:
            ours = wrap(ours, ConfigurablePolicy(CODED), 256, store=store, fused=fused)
        for param, optimizer in zip(params, (plain, ours), strict=True):
            param.grad = torch.ones(700)
            optimizer.step()
    assert ours.state[params[1]]["step"] == plain.state[params[0]]["step"] == 6
    torch.testing.assert_close(*params, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["exact", "coded", "coded-fused"])
@pytest.mark.parametrize("store", ["device", "host"])
def test_setstate_takes_state_and_groups(kind, store) -> None:
    pair = Pair(kind, store)
    for optimizer in (pair.ours, pair.plain):
        optimizer.__setstate__({"state": defaultdict(dict)})
        assert not optimizer.state
    pair.step()
    pair.check()
    assert {float(state["step"]) for state in pair.ours.state.values()} == {1.0}
    for optimizer in (pair.ours, pair.plain):
        groups = [{**group, "lr": 0.5} for group in optimizer.param_groups]
        state = {param: {**values} for param, values in optimizer.state.items()}
        optimizer.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        assert optimizer.param_groups is groups
    for a, b in zip(pair.mine, pair.theirs, strict=True):
        b.data.copy_(a)
        if not pair.exact:
            for key, value in pair.ours.state[a].items():
                pair.plain.state[b][key] = value.clone()
    pair.step()
    pair.check()
