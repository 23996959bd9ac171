"""Hooks around steps, saving and loading: they fire once, in torch's order, with the optimizer."""

import copy
from unittest import mock

import torch
from accounting import account_for, over
from problems import Problem, after, assert_equal
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_inputs import Case


@over()
def test_step_hooks(subject, case) -> None:
    """The user's own and global ones, around the step, until they are removed."""
    problem = Problem(subject, subject.make)
    optimizer, before = problem.optimizer, problem.values()
    seen = []

    def noting(name):
        def hook(given, args, kwargs) -> None:
            changed = not torch.equal(problem.params[0], before[0])
            seen.append((name, given is optimizer, len(args) + len(kwargs), changed))

        return hook

    handles = [
        optimizer.register_step_post_hook(noting("post")),
        optimizer.register_step_pre_hook(noting("pre")),
        register_optimizer_step_post_hook(noting("global post")),
        register_optimizer_step_pre_hook(noting("global pre")),
    ]
    problem.run()
    for handle in handles:
        handle.remove()
    problem.run()
    given = 1 + subject.needs_closure
    order = ("global pre", "pre", "post", "global post")
    assert seen == [(name, True, given, "post" in name) for name in order]
    assert_equal(problem.values(), after(subject, 2), "params")


@over()
def test_step_hook_gives_other_arguments(subject, case) -> None:
    """What a hook before the step returns stands in place of the arguments."""
    problem = Problem(subject, subject.make)
    problem.evaluate()
    problem.optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, problem.evaluate), {}))
    first = problem.evaluate()
    assert float(problem.optimizer.step(lambda: 0.0)) == float(first)


@over()
def test_state_dict_hooks(subject, case) -> None:
    """One before may put any entry into the state, one after may return another dict."""
    problem = Problem(subject, subject.make).run()
    optimizer, seen = problem.optimizer, []

    def before(given) -> None:
        seen.append(given)
        given.state["test"] = 1

    def after(given, state_dict):
        seen.append(given)
        assert state_dict["state"]["test"] == 1
        return {**state_dict, "also": True}

    optimizer.register_state_dict_post_hook(after)
    optimizer.register_state_dict_pre_hook(before)
    state_dict = optimizer.state_dict()
    assert state_dict["also"] is True
    assert all(given is optimizer for given in seen)
    assert len(seen) == 2
    assert optimizer.state["test"] == 1
    # it steps and is saved on with it, and another one loads it
    problem.run()
    assert optimizer.state["test"] == 1
    assert optimizer.state_dict()["state"]["test"] == 1
    other = Problem(subject, subject.make)
    other.optimizer.load_state_dict(copy.deepcopy(state_dict))
    assert other.optimizer.state["test"] == 1
    other.run()
    copied = copy.deepcopy((other.params, other.optimizer))[1]
    assert copied.state["test"] == 1


@over()
def test_state_dict_hooks_in_order(subject, case) -> None:
    """In the order of registration, with those to be prepended first."""
    optimizer = Problem(subject, subject.make).optimizer
    seen = []
    for name in ("first", "second"):
        for prepend in (False, True):
            key = f"{name}, prepended" if prepend else name
            optimizer.register_state_dict_pre_hook(
                lambda o, key=key: seen.append(f"pre {key}"), prepend=prepend
            )
            optimizer.register_state_dict_post_hook(
                lambda o, d, key=key: seen.append(f"post {key}"), prepend=prepend
            )
    optimizer.state_dict()
    order = ["second, prepended", "first, prepended", "first", "second"]
    assert seen == [f"{when} {key}" for when in ("pre", "post") for key in order]


LOADED = [Case("changed in place", {"new": False}), Case("returned", {"new": True})]


@over(lambda subject: LOADED)
def test_load_state_dict_hooks(subject, case) -> None:
    """Before loading they may change or replace the dict, those to be prepended first."""
    problem = Problem(subject, subject.make).run()
    state_dict = copy.deepcopy(problem.optimizer.state_dict())
    rate = state_dict["param_groups"][0]["lr"]
    optimizer, seen = problem.optimizer, []

    def rated(lr):
        def hook(given, loading):
            seen.append((given is optimizer, loading["param_groups"][0]["lr"]))
            if case.kwargs["new"]:
                loading = copy.deepcopy(loading)
            loading["param_groups"][0]["lr"] = lr
            return loading if case.kwargs["new"] else None

        return hook

    def after(given) -> None:
        seen.append((given is optimizer, given.param_groups[0]["lr"]))
        given.state["loaded"] = True

    optimizer.register_load_state_dict_pre_hook(rated(0.002))
    optimizer.register_load_state_dict_pre_hook(rated(0.003), prepend=True)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(state_dict)
    assert seen == [(True, rate), (True, 0.003), (True, 0.002)]
    assert optimizer.param_groups[0]["lr"] == 0.002
    assert optimizer.state["loaded"] is True
    # one that returns another leaves what was given as it was
    assert state_dict["param_groups"][0]["lr"] == (rate if case.kwargs["new"] else 0.002)
    problem.run()


@over()
def test_profiles(subject, case) -> None:
    """A step and ``zero_grad`` are recorded once, under the names of the optimizer's class."""
    problem = Problem(subject, subject.make)
    record = torch.autograd.profiler.record_function
    with mock.patch.object(torch.autograd.profiler, "record_function", side_effect=record) as made:
        problem.run()
        problem.optimizer.zero_grad()
    name = type(problem.optimizer).__name__
    names = [call.args[0] for call in made.call_args_list]
    assert names == [f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"]


def test_every_case_is_accounted_for() -> None:
    account_for(__name__)
