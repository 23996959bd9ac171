"""An exception anywhere in a step leaves every parameter either before its step or after it."""

import copy
from unittest import mock

import pytest
import torch

from optstate_wrap import ConfigurablePolicy, StepError, wrap
from optstate_wrap.offload import host, slabs, transfers
from optstate_wrap.state import encoder, store
from optstate_wrap.step import chunked, transaction

SHAPES = ((20, 33), (7,), (900,), (3, 3))

#: what fails, by phase: where it is, and its name
PHASES = {
    "keep": (transaction.Transaction, "keep"),
    "load": (store.DeviceStore, "load"),
    "decode": (chunked, "decode_state"),
    "step": (chunked, "unhooked_step"),
    "encode": (encoder, "encode_state"),
    "store": (store.DeviceStore, "to_store"),
    "bring": (transfers.StateRing, "load"),
    "slab": (slabs.Spares, "take"),
    "send": (transfers.StateRing, "store"),
}
STORES = {"device": store.DeviceStore, "host": host.HostStore}
POLICIES = {
    "exact": ConfigurablePolicy({}),
    "coded": ConfigurablePolicy({"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)"}),
}


class Boom(Exception):
    """What the tests raise."""


def failing(real, call: int, after: bool):
    """``real``, but for one call, which raises, before or after doing what it does."""
    calls = iter(range(1 << 20))

    def stand_in(*args, **kwargs):
        if next(calls) != call:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise Boom("boom")

    return stand_in


def run_of(problem, policy, where="device"):
    """Through the inner optimizer: ``test_fused.py`` has the other way."""

    def make(groups):
        inner = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        return wrap(inner, policy, 256, store=where, fused=False)

    return problem(make, shapes=SHAPES)


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("phase", PHASES)
def test_fault_in_every_chunk_and_phase(
    problem, phase, after, policy, where, record_property
) -> None:
    if phase == "encode" and policy == "exact":
        pytest.skip("nothing is encoded")
    if phase in ("bring", "slab", "send") and where == "device":
        pytest.skip("nothing is moved")
    owner, name = PHASES[phase]
    if phase in ("load", "store"):
        owner = STORES[where]
    if phase == "step":
        real = chunked.unhooked_step

        def make_failing(call):
            calls = iter(range(1 << 20))

            def unhooked_step(inner):
                step, number = real(inner), next(calls)

                def stepped(*args):
                    if number == call and not after:
                        raise Boom("boom")
                    step(*args)
                    if number == call:
                        raise Boom("boom")

                return stepped

            return unhooked_step
    else:
        real = getattr(owner, name)

        def make_failing(call):
            return failing(real, call, after)

    number = 0
    while True:
        before = run_of(problem, POLICIES[policy], where).run(2)
        stepped = copy.deepcopy(before).run(1)
        ours = copy.deepcopy(before)
        groups = [dict(group) for group in ours.optimizer.param_groups]
        ours.set_gradients()
        with mock.patch.object(owner, name, make_failing(number)):
            try:
                ours.optimizer.step()
            except StepError as error:
                caught = error
            else:
                break
        assert isinstance(caught.__cause__, Boom)
        assert "boom" in str(caught)
        check(before, stepped, ours, caught)
        for group, old in zip(ours.optimizer.param_groups, groups, strict=True):
            assert group.keys() == old.keys()
            assert all(group[key] is old[key] for key in group)
        # nothing is broken: what is left can be stepped
        for param in [ours.params[i] for i in caught.stepped]:
            param.grad = None
        ours.optimizer.step()
        if not any(p.grad is None for i, p in enumerate(ours.params) if i not in caught.stepped):
            for ours_now, theirs in zip(ours.params, stepped.params, strict=True):
                assert torch.equal(ours_now, theirs)
        number += 1
    assert number >= (2 if phase == "store" else 4)
    record_property("faults injected", number)


def check(before, stepped, ours, error) -> None:
    """Parameters and state are those of after the step where the error says so, else of before."""
    left, right, now = before.tensors(), stepped.tensors(), ours.tensors()
    for name, value in now.items():
        number = int(name.split()[-1])
        expected = right if number in error.stepped else left
        assert torch.equal(value, expected[name]), (name, error)
    moved = {i for i, p in enumerate(ours.params) if p.grad is not None}
    assert set(error.stepped) | set(error.unstepped) == moved


def test_interrupt_is_not_wrapped_but_rolled_back(problem, same) -> None:
    def interrupted(inner):
        return mock.Mock(side_effect=KeyboardInterrupt)

    ours = run_of(problem, POLICIES["exact"]).run(2)
    before = copy.deepcopy(ours)
    ours.set_gradients()
    with mock.patch.object(chunked, "unhooked_step", interrupted), pytest.raises(KeyboardInterrupt):
        ours.optimizer.step()
    same(before, ours)
