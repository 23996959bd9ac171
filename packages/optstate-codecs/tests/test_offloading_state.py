"""The state of an optimizer that keeps it elsewhere: shown, changed, replaced, saved, copied."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from offloads import SHAPES, Pair, assert_alike, params, run
from subjects import adam

from optstate_codecs import predicted_state_bytes, state_bytes
from optstate_codecs.offloading import offload

EXACT = ("fp32", "fp32")
DYNAMIC = ("dynamic8(units=update)", "dynamic8(signed=False, rounding=stochastic)")
# one chunk, which stays in its slot of the ring, and many
SIZES = (1 << 25, 9000)


@pytest.fixture(params=SIZES)
def pair(request, where):
    return Pair(adam(*EXACT, lr=0.01), chunk_bytes=request.param, **where).run(3)


def _each_state(pair):
    for ours, optimizer in pair.each():
        yield ours, optimizer.state


def test_state_changed_in_place_reaches_the_next_step(pair):
    for ours, state in _each_state(pair):
        state[ours[0]]["exp_avg"].mul_(-2.0)
        state[ours[5]]["exp_avg_sq"].data.add_(1.0)
        state[ours[2]]["step"].fill_(100.0)
    pair.run(3).check()


def test_state_that_is_held_and_changed_later_reaches_the_next_step():
    """In host memory the tensors stay the same ones."""
    pair = Pair(adam(*EXACT, lr=0.01), chunk_bytes=9000).run(1, missing=False)
    held = [state[ours[n]]["exp_avg"] for ours, state in _each_state(pair) for n in (0, 1, 3)]
    for _ in range(6):
        # some have no gradient, and come along with others in their chunk
        pair.run(1)
        for value in held:
            value.zero_()
    pair.run(1).check()


def test_state_that_is_replaced_reaches_the_next_step(pair):
    for ours, state in _each_state(pair):
        for index in (0, 1, 3):
            state[ours[index]]["exp_avg"] = torch.full_like(ours[index], 0.5 + index)
        state[ours[2]]["exp_avg"] = state[ours[2]]["exp_avg_sq"].clone()
        state[ours[3]]["step"] = torch.tensor(50.0)
    pair.check("as replaced")
    pair.run(3).check("after steps")


def test_state_whose_tensors_are_exchanged(pair):
    for ours, state in _each_state(pair):
        mine = state[ours[0]]
        mine["exp_avg"], mine["exp_avg_sq"] = mine["exp_avg_sq"].abs(), mine["exp_avg"].abs()
        mine = state[ours[5]]
        mine["exp_avg_sq"], mine["exp_avg"] = mine["exp_avg"].abs_(), mine["exp_avg_sq"]
    pair.run(3).check()


def test_state_that_is_replaced_where_it_is_held(pair):
    """Through the parameter's own dict, which somebody has kept since before a step."""
    held = [state[ours[1]] for ours, state in _each_state(pair)]
    pair.run(1, missing=False)
    for mine in held:
        mine["exp_avg"] = torch.ones(50)
    pair.run(2).check()


def test_state_that_is_deleted_begins_anew(pair):
    for ours, state in _each_state(pair):
        del state[ours[0]], state[ours[3]]
    pair.run(3).check()


def test_parameters_that_moved(pair):
    for ours in pair.params:
        for index in (0, 1, 4):
            ours[index].data = ours[index].data.clone() + 1.0
    pair.run(3).check()


def _saved(value, weights_only=True):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("method", ["state_dict", "full_state_dict"])
def test_state_dicts_load_either_way(method, steps, size, where):
    make = adam(*(EXACT if method == "full_state_dict" else DYNAMIC), lr=0.01)
    pair = Pair(make, chunk_bytes=size, **where).run(4)
    whole = [_saved(getattr(optimizer, method)()) for optimizer in pair.optimizers]
    values = [p.detach().clone() for p in pair.params[0]]
    # each loads the other's, in the middle of something else
    other = Pair(make, chunk_bytes=size).run(steps)
    for (ours, optimizer), saved in zip(other.each(), reversed(whole), strict=True):
        for param, value in zip(ours, values, strict=True):
            param.data.copy_(value)
        optimizer.load_state_dict(saved)
    other.time = pair.time
    pair.run(3).check()
    other.run(3).check()
    assert_alike((pair.params[0], other.params[1]), (pair.optimizers[0], other.optimizers[1]))


def test_state_dicts_of_other_formats_and_of_torch(where):
    pair = Pair(adam(*DYNAMIC, lr=0.01), chunk_bytes=9000, **where).run(2)
    exact = params()
    plain = torch.optim.Adam(exact, lr=0.02)
    for time in range(3):
        run(exact, plain, time)
    coded = adam("bf16", "fp32", lr=0.02)(exact)
    run(exact, coded, 3)
    for state_dict in (plain.state_dict(), coded.state_dict()):
        for _, optimizer in pair.each():
            optimizer.load_state_dict(copy.deepcopy(state_dict))
        pair.run(3).check()


def test_state_dict_that_does_not_fit_changes_nothing(where):
    pair = Pair(adam(*DYNAMIC, lr=0.01), chunk_bytes=9000, **where).run(2)
    state_dict = copy.deepcopy(pair.optimizers[1].state_dict())
    state_dict["state"][2]["exp_avg_scale"] = torch.ones(7)
    with pytest.raises(ValueError, match="exp_avg_scale"):
        pair.optimizers[1].load_state_dict(state_dict)
    pair.run(3).check()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_go_their_own_way(how, where):
    pair = Pair(adam(*DYNAMIC, lr=0.01), chunk_bytes=9000, **where).run(3)
    both = pair.params[1], pair.optimizers[1]
    if how == "deepcopy":
        ours, optimizer = copy.deepcopy(both)
    elif how == "pickle":
        ours, optimizer = pickle.loads(pickle.dumps(both))
    else:
        ours, optimizer = _saved(both, weights_only=False)
    assert optimizer.offloaded.store == "host"
    assert optimizer.offloaded.path is None
    frozen = {i: s["step"].clone() for i, s in enumerate(optimizer.state.values())}
    pair.run(3).check("the first")
    assert all(torch.equal(s["step"], frozen[i]) for i, s in enumerate(optimizer.state.values()))
    for time in range(3, 6):
        run(ours, optimizer, time)
    assert_alike((pair.params[0], ours), (pair.optimizers[0], optimizer), "the copy")


LARGE = ((300, 1000), (7, 40_000), (5000,), (2, 70_000))


@pytest.mark.parametrize("formats", [EXACT, DYNAMIC], ids=["fp32", "dynamic8"])
@pytest.mark.parametrize("size", [1 << 25, 200_000])
def test_bytes(formats, size, where):
    optimizer = offload(adam(*formats, lr=0.01)(params(shapes=LARGE)), chunk_bytes=size, **where)
    ours = optimizer.param_groups[0]["params"]
    for time in range(3):
        run(ours, optimizer, time, missing=False)
    stream = optimizer.executor
    predicted = predicted_state_bytes(optimizer)
    kept = sum(slab.nbytes for slab in stream.placement.slabs)
    assert state_bytes(optimizer) == predicted
    assert predicted - 4 * len(ours) <= kept <= 1.015 * predicted
    rings = stream.placement.rings.values()
    held = sum(slot.memory.untyped_storage().nbytes() for ring in rings for slot in ring.slots)
    largest = max(chunk.nbytes for chunk in stream.placement.chunks)
    assert held == 3 * largest
    assert largest <= max(1.05 * size, 8192 * 9)


def test_what_is_dropped_is_freed_at_once(where):
    gc.collect()
    gc.disable()
    try:
        optimizer = offload(adam(*DYNAMIC, lr=0.01)(params()), chunk_bytes=9000, **where)
        ours = optimizer.param_groups[0]["params"]
        for time in range(3):
            run(ours, optimizer, time)
        stream = optimizer.executor
        known = [weakref.ref(stream), weakref.ref(stream.store)]
        known += [weakref.ref(memory) for slab in stream.placement.slabs for memory in slab.family]
        rings = stream.placement.rings.values()
        known += [weakref.ref(slot.memory) for ring in rings for slot in ring.slots]
        del stream, optimizer, rings
        assert [reference for reference in known if reference() is not None] == []
    finally:
        gc.enable()
    assert len(ours) == len(SHAPES)
