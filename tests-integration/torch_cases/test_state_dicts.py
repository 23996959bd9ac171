"""State dicts and copies: training goes on from them bit for bit, whatever wrote them."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from accounting import account_for, over
from expected import NO_SUCH_ARGUMENT, ONE_GROUP
from problems import Problem, after, assert_equal
from torch_inputs import Case, cases


def saved(subject, optimizer):
    """What goes on bit for bit when it is loaded: of coded state in a wrapper, the packed one."""
    packed = subject.error and not subject.coded
    return optimizer.packed_state_dict() if packed else optimizer.state_dict()


def resumed(problem, build, state_dict) -> Problem:
    """A second problem with the parameters of the first and an optimizer that loads."""
    second = Problem(problem.subject, build)
    for param, value in zip(second.params, problem.values(), strict=True):
        param.data.copy_(value)
    second.time = problem.time
    second.optimizer.load_state_dict(state_dict)
    return second


def go_on_alike(left, right, steps=1) -> None:
    """Both take the same steps from here on."""
    assert_equal(left.run(steps).values(), right.run(steps).values(), "params")
    assert_equal(left.optimizer.state_dict(), right.optimizer.state_dict(), "state_dict")


@over(lambda subject: cases(subject.like), NO_SUCH_ARGUMENT)
def test_save_and_load(subject, case) -> None:
    """Through a file that is read with ``weights_only``; what was saved stays what it was."""
    build = partial(subject.make, **case.kwargs)
    first = Problem(subject, build).run(2)
    file = io.BytesIO()
    state_dict = saved(subject, first.optimizer)
    torch.save(state_dict, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_equal(loaded, state_dict, "file")
    second = resumed(first, build, loaded)
    kept = copy.deepcopy(loaded)
    go_on_alike(first, second)
    assert_equal(loaded, kept, "what was loaded")


#: options that groups of older releases lack
LATER = ("capturable", "differentiable", "foreach", "fused", "maximize")


@over()
def test_older_state_dict(subject, case) -> None:
    """What a group does not say, the optimizer that loads it has."""
    first = Problem(subject, subject.make).run(2)
    state_dict = copy.deepcopy(saved(subject, first.optimizer))
    for group in state_dict["param_groups"]:
        for flag in LATER:
            group.pop(flag, None)
    second = resumed(first, subject.make, state_dict)
    groups = zip(first.optimizer.param_groups, second.optimizer.param_groups, strict=True)
    assert all(mine.keys() == theirs.keys() for mine, theirs in groups)
    go_on_alike(first, second)


NUMBERS = [Case("float", {"kind": float}), Case("int", {"kind": int})]
UNCOUNTED = {
    ("wrap-LBFGS", "*"): "torch's LBFGS counts iterations, which are numbers",
    ("wrap-SGD", "*"): "torch's SGD counts no steps",
    ("wrap-Muon", "*"): "torch's Muon counts no steps",
    ("OffloadOptimizer-SGD", "*"): "torch's SGD counts no steps",
    ("CPUOffload-SGD", "*"): "torch's SGD counts no steps",
}


@over(lambda subject: NUMBERS, UNCOUNTED)
def test_step_that_is_a_number(subject, case) -> None:
    """Step counts that are numbers are loaded as those that are tensors."""
    first = Problem(subject, subject.make).run(2)
    plain = first.optimizer.state_dict()
    state_dict = copy.deepcopy(plain)
    counted = [state for state in state_dict["state"].values() if "step" in state]
    assert counted
    for state in counted:
        state["step"] = case.kwargs["kind"](state["step"])
    go_on_alike(*(resumed(first, subject.make, loaded) for loaded in (plain, state_dict)))


NAMED = [
    Case(f"{first} into {second}", {"first": first, "second": second})
    for first in ("named", "plain")
    for second in ("named", "plain", "renamed")
]


def named(kind, make):
    if kind == "plain":
        return make
    prefix = {"named": "layer", "renamed": "other"}[kind]
    return lambda params: make([(f"{prefix}.{n}", p) for n, p in enumerate(params)])


@over(lambda subject: NAMED)
def test_names(subject, case) -> None:
    """Names of parameters are saved, and loaded as torch loads them."""
    names = []
    for make in (subject.make, subject.inside):
        first = Problem(subject, named(case.kwargs["first"], make))
        second = resumed(first, named(case.kwargs["second"], make), first.optimizer.state_dict())
        optimizers = first.optimizer, second.optimizer
        names.append([[g.get("param_names") for g in o.param_groups] for o in optimizers])
    assert names[0] == names[1]
    assert case.kwargs["first"] == "plain" or names[0][0][0] == ["layer.0", "layer.1"]


COPIES = [
    Case("deepcopy", {"copied": copy.deepcopy}),
    Case("pickle", {"copied": lambda pair: pickle.loads(pickle.dumps(pair))}),
]


def attributes(optimizer) -> set[str]:
    return {name for name in vars(optimizer) if not name.startswith("_")}


LOST = {("wrap-LBFGS", "*"): "a copy of torch's LBFGS has no parameters to step"}


@over(lambda subject: COPIES, LOST)
def test_copies(subject, case) -> None:
    """A copy has all public attributes, and goes its own way as the first one does."""
    first = Problem(subject, subject.make).run(2)
    second = Problem(subject, subject.make)
    copied = case.kwargs["copied"]((first.params, first.optimizer))
    second.params, second.optimizer = copied
    second.time = first.time
    assert type(second.optimizer) is type(first.optimizer)
    assert attributes(second.optimizer) == attributes(first.optimizer)
    before = first.values()
    second.run()
    assert_equal(first.values(), before, "the first")
    assert_equal(first.run().values(), second.values(), "params")
    assert_equal(first.optimizer.state_dict(), second.optimizer.state_dict(), "state_dict")


@over()
def test_state_is_not_empty(subject, case) -> None:
    """After a step, each state has entries under strings."""
    kwargs = {"momentum": 0.9} if subject.like == "SGD" else {}
    problem = Problem(subject, lambda p: subject.make(p, **kwargs)).run()
    states = [dict(state) for state in problem.optimizer.state.values()]
    assert states
    assert all(states)
    assert {type(key) for state in states for key in state} == {str}
    assert set(problem.optimizer.state_dict()) >= {"state", "param_groups"}


MISMATCHES = [
    Case("a group more", {"change": lambda groups: groups.append(groups[0])}),
    Case("a parameter less", {"change": lambda groups: groups[0]["params"].pop()}),
    Case("no groups", {"change": lambda groups: groups.clear()}),
]


@over(lambda subject: MISMATCHES)
def test_what_does_not_fit(subject, case) -> None:
    """A state dict of other groups is refused, and nothing has changed."""
    problem = Problem(subject, subject.make).run()
    state_dict = copy.deepcopy(saved(subject, problem.optimizer))
    case.kwargs["change"](state_dict["param_groups"])
    with pytest.raises(ValueError, match="group"):
        problem.optimizer.load_state_dict(state_dict)
    assert_equal(problem.run().values(), after(subject, 2), "params")


@over(lambda subject: [Case("groups", {})], ONE_GROUP)
def test_groups_are_the_same_objects(subject, case) -> None:
    """Groups that a scheduler holds are still the optimizer's after loading."""

    def build(params):
        return subject.make([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}])

    first = Problem(subject, build).run()
    groups = list(first.optimizer.param_groups)
    state_dict = copy.deepcopy(saved(subject, first.optimizer))
    state_dict["param_groups"][1]["lr"] = 0.25
    first.optimizer.load_state_dict(state_dict)
    assert all(map(lambda a, b: a is b, groups, first.optimizer.param_groups))
    assert [group["lr"] for group in groups] == [0.5, 0.25]


def test_every_case_is_accounted_for() -> None:
    account_for(__name__)
