"""Groups of parameters: what they take, what is added later, and what is refused."""

import pytest
import torch
from accounting import account_for, over
from expected import ONE_GROUP
from family import FAMILY
from problems import Problem, after, assert_equal, compare, normal
from torch.nn import Parameter
from torch_inputs import Case


def fresh(seed: int = 9) -> Parameter:
    return Parameter(normal((4, 3), seed).float())


KINDS = [
    Case("list", {"given": lambda p: p}),
    Case("generator", {"given": iter}),
    Case("names", {"given": lambda p: [(f"p{n}", v) for n, v in enumerate(p)]}),
    Case("named generator", {"given": lambda p: ((f"p{n}", v) for n, v in enumerate(p))}),
    Case("dict", {"given": lambda p: {f"p{n}": v for n, v in enumerate(p)}.values()}),
    Case("group", {"given": lambda p: [{"params": p}]}),
    Case("group of a generator", {"given": lambda p: [{"params": iter(p)}]}),
    Case("groups of a tensor", {"given": lambda p: [{"params": v} for v in p]}),
    Case("groups of names", {"given": lambda p: [{"params": [(str(id(v)), v)]} for v in p]}),
]
ONE = {("wrap-LBFGS", "groups of*"): ONE_GROUP["wrap-LBFGS", "*"]}


@over(lambda subject: KINDS, ONE)
def test_parameters_may_be_given_as(subject, case) -> None:
    """As lists, iterators, pairs with names, and groups of those."""
    given = case.kwargs["given"]
    problem = Problem(subject, lambda p: subject.make(given(p)))
    assert_equal(problem.run().values(), after(subject, 1), "params")


@over(lambda subject: [Case("added", {})], ONE_GROUP)
def test_a_group_that_is_added(subject, case) -> None:
    """It has the defaults, but for what it says, and is stepped with the others from then on."""

    def adding(optimizer) -> None:
        if len(optimizer.param_groups) == 1:
            late = optimizer.param_groups[0]["params"].pop()
            optimizer.add_param_group({"params": late, "lr": 2.0**-7})

    keys = []

    def between(optimizer) -> None:
        adding(optimizer)
        keys.append([group.keys() - {"initial_lr"} for group in optimizer.param_groups])

    compare(
        subject,
        lambda p: subject.make(p, **subject.plus),
        lambda p: subject.exact(p, **subject.plus),
        between=between,
    )
    assert all(first == second for first, second in keys)


def leafless() -> torch.Tensor:
    return fresh() * 2


BAD = [
    Case("a set", {"group": lambda p: {"params": {fresh()}}, "error": TypeError}),
    Case("no dict", {"group": lambda p: [fresh()], "error": TypeError}),
    Case("no tensor", {"group": lambda p: {"params": [fresh(), 1.0]}, "error": TypeError}),
    Case("not a leaf", {"group": lambda p: {"params": [leafless()]}, "error": ValueError}),
    Case("one that is there", {"group": lambda p: {"params": [p[0]]}, "error": ValueError}),
    Case("names", {"group": lambda p: {"params": [("p", fresh())]}, "error": ValueError}),
    Case(
        "names in part",
        {"group": lambda p: {"params": [("p", fresh(1)), fresh(2)]}, "error": ValueError},
    ),
    Case("duplicates", {"group": lambda p: {"params": [fresh()] * 2}, "error": UserWarning}),
    Case("a bad lr", {"group": lambda p: {"params": [fresh()], "lr": "fast"}, "error": TypeError}),
]


UNCHECKED = {
    (subject.name, "a bad lr"): "torch's classes do not check what a group says"
    for subject in FAMILY
    if not subject.coded
}


@over(lambda subject: BAD, UNCHECKED)
def test_a_group_that_is_refused(subject, case) -> None:
    """By torch's rules; the optimizer is what it was, and goes on as if nothing had been."""
    problem = Problem(subject, subject.make).run()
    groups = list(problem.optimizer.param_groups)
    group = case.kwargs["group"](problem.params)
    with pytest.raises(case.kwargs["error"]):
        problem.optimizer.add_param_group(group)
    assert len(problem.optimizer.param_groups) == len(groups)
    assert_equal(problem.run().values(), after(subject, 2), "params")


EMPTY = [
    Case("no parameters", {"given": []}),
    Case("a tensor", {"given": torch.zeros(3)}),
    Case("numbers", {"given": [1.0]}),
]


@over(lambda subject: EMPTY)
def test_what_is_no_list_of_parameters(subject, case) -> None:
    """Refused when it is given, in torch's words."""
    says = "empty parameter list|iterable of Tensors|can only optimize Tensors"
    with pytest.raises((TypeError, ValueError), match=says):
        subject.make(case.kwargs["given"])


def test_every_case_is_accounted_for() -> None:
    account_for(__name__)
