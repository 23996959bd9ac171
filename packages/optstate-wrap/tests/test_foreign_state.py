"""Entries of the state that the optimizer does not make pass through, as in torch.optim."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn import Parameter

from optstate_wrap import ConfigurablePolicy, wrap

CODED = {"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)"}
KINDS = {"exact": {}, "coded": CODED}


def plain(params):
    return torch.optim.AdamW(params, lr=1e-2)


def wrapped(codecs, chunk=256, store="device"):
    # a policy that would code anything that it is given a chance to code
    policy = ConfigurablePolicy(codecs, default_codec="int8" if codecs else None)
    return lambda params: wrap(plain(params), policy, chunk, store=store)


def run(make, frozen: bool = True):
    """An optimizer with foreign entries, for several parameters, one of which has no gradient."""
    generator = torch.Generator().manual_seed(0)
    params = [
        Parameter(torch.randn(shape, generator=generator)) for shape in ((20, 33), (7,), (4,))
    ]
    optimizer = make(params)
    for param in params[:2] if frozen else params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state
    state["test"] = 1
    state["scale"] = torch.tensor([1.0, 2.0])
    state["nested"] = {"values": [torch.ones(2), "text"]}
    state[params[0]]["slow"] = torch.arange(660.0).view(20, 33)
    state[params[0]]["mask"] = torch.arange(660).view(20, 33) % 2 == 0
    state[params[1]]["count"] = 3
    state[params[1]]["tag"] = "a"
    state[params[2]]["slow"] = torch.arange(4.0)
    return params, optimizer


def assert_foreign(params, optimizer, loaded_by_torch: bool = False) -> None:
    state = optimizer.state
    assert state["test"] == 1
    assert torch.equal(state["scale"], torch.tensor([1.0, 2.0]))
    assert torch.equal(state["nested"]["values"][0], torch.ones(2))
    assert torch.equal(state[params[0]]["slow"], torch.arange(660.0).view(20, 33))
    mask = torch.arange(660).view(20, 33) % 2 == 0
    assert torch.equal(state[params[0]]["mask"].bool(), mask)
    # torch makes them float32, and of a string a generator
    assert state[params[0]]["mask"].dtype == torch.bool or loaded_by_torch
    assert state[params[1]]["count"] == 3
    assert state[params[1]]["tag"] == "a" or loaded_by_torch
    assert torch.equal(state[params[2]]["slow"], torch.arange(4.0))


def loaded(saved):
    """What torch makes of a file with it."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("chunk", [256, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["state_dict", "packed_state_dict", "deepcopy", "pickle", "unwrap"])
def test_goes_wherever_the_state_goes(how, kind, chunk, store) -> None:
    make = wrapped(KINDS[kind], chunk, store)
    params, optimizer = run(make)
    if how == "deepcopy":
        params, optimizer = copy.deepcopy((params, optimizer))
    elif how == "pickle":
        params, optimizer = pickle.loads(pickle.dumps((params, optimizer)))
    elif how == "unwrap":
        slow = optimizer.state[params[0]]["slow"]
        optimizer = optimizer.unwrap()
        assert optimizer.state[params[0]]["slow"] is slow
    else:
        saved = loaded(getattr(optimizer, how)())
        twins = [Parameter(param.detach().clone()) for param in params]
        optimizer, params = make(twins), twins
        optimizer.load_state_dict(saved)
        # nothing of it is aliased
        saved["state"]["scale"].zero_()
        saved["state"]["nested"]["values"][0].zero_()
    assert_foreign(params, optimizer)
    assert optimizer.state[params[2]].keys() == {"slow"}
    # Adam steps no parameter whose state is there and has none of its own
    params[0].grad, params[1].grad = torch.ones(20, 33), torch.ones(7)
    optimizer.step()
    assert_foreign(params, optimizer)
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_to_torch_and_back(kind) -> None:
    make = wrapped(KINDS[kind])
    # torch's AdamW cannot load a state that has no step count
    params, ours = run(make, frozen=False)
    theirs = plain([Parameter(param.detach().clone()) for param in params])
    theirs.load_state_dict(loaded(ours.state_dict()))
    assert_foreign(theirs.param_groups[0]["params"], theirs, loaded_by_torch=True)
    params, theirs = run(plain, frozen=False)
    twins = [Parameter(param.detach().clone()) for param in params]
    ours = make(twins)
    ours.load_state_dict(loaded(theirs.state_dict()))
    assert_foreign(twins, ours)


def test_what_only_others_have_written_loads_again() -> None:
    """Before the first step, no state has any key of the optimizer's own."""
    for make in (wrapped({}), wrapped(CODED)):
        params = [Parameter(torch.ones(20, 33))]
        optimizer = make(params)
        optimizer.state[params[0]]["slow"] = torch.full((20, 33), 3.0)
        for saved in (optimizer.state_dict(), optimizer.packed_state_dict()):
            twins = [Parameter(torch.ones(20, 33))]
            twin = make(twins)
            twin.load_state_dict(loaded(saved))
            assert torch.equal(twin.state[twins[0]]["slow"], torch.full((20, 33), 3.0))


def test_it_stays_the_same_object_through_steps() -> None:
    for chunk in (256, 1 << 20):
        params, optimizer = run(wrapped(CODED, chunk))
        slow, nested = optimizer.state[params[0]]["slow"], optimizer.state["nested"]
        for step in range(3):
            params[0].grad = torch.ones(20, 33)
            optimizer.step()
            slow.fill_(step)
            assert optimizer.state[params[0]]["slow"] is slow
            assert optimizer.state["nested"] is nested
            assert (optimizer.state_dict()["state"][0]["slow"] == step).all()
        del optimizer.state[params[0]]["slow"]
        optimizer.step()
        assert "slow" not in optimizer.state[params[0]]


class Scaled(torch.optim.SGD):
    """Reads and writes what others have put into the state, and makes none of it."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if "scale" in state and param.grad is not None:
                    param.sub_(param.grad * state["scale"])
                    state["scale"].mul_(0.5)
                    state["seen"] = state.get("seen", 0) + 1


@pytest.mark.parametrize("chunk", [256, 1 << 20])
def test_the_optimizer_sees_it(chunk) -> None:
    ends = []
    for make in (
        lambda p: Scaled(p, lr=0.1),
        lambda p: wrap(Scaled(p, lr=0.1), ConfigurablePolicy({}), chunk),
    ):
        params = [Parameter(torch.ones(20, 33))]
        optimizer = make(params)
        optimizer.state[params[0]]["scale"] = torch.linspace(0, 1, 660).view(20, 33)
        for _ in range(3):
            params[0].grad = torch.ones(20, 33)
            optimizer.step()
        ends.append([params[0], optimizer.state[params[0]]["scale"]])
        assert optimizer.state[params[0]]["seen"] == 3
    assert all(map(torch.equal, *ends))


def test_hooks_of_state_dicts_see_the_wrapper() -> None:
    """As in PyTorch's own tests of these hooks."""
    seen = {}

    def before(optimizer) -> None:
        optimizer.state["test"] = 1

    def after(optimizer, state_dict):
        state_dict["ran"] = state_dict["state"].pop("test", None)
        seen[type(optimizer).__name__] = optimizer
        return state_dict

    for make in (plain, wrapped({}), wrapped(CODED)):
        param = Parameter(torch.ones(3))
        optimizer = make([param])
        optimizer.register_state_dict_pre_hook(before)
        optimizer.register_state_dict_post_hook(after)
        param.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.state_dict()["ran"] == 1
        assert optimizer.state["test"] == 1
        assert seen[type(optimizer).__name__] is optimizer


def test_memory_is_counted() -> None:
    params, optimizer = run(wrapped({}))
    report = optimizer.memory_report()
    own = sum(param.numel() * 8 + 4 for param in params[:2])
    foreign = 660 * 4 + 660 + 4 * 4 + 8 + 8
    parts = 3  # of the first one, with a count each
    assert report.plain_state_bytes == own + 4 * (parts - 1) + foreign
    assert report.state_bytes >= report.plain_state_bytes
