"""Every combination of arguments that torch tests its classes with: values, flags, errors."""

import pytest
import torch
from accounting import Refused, account_for, over
from expected import AMSGRAD_WITH_TENSORS, NO_SUCH_ARGUMENT
from family import FAMILY
from problems import Problem, after, assert_equal, compare, normal
from suite.discovery import own_attributes
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch_inputs import INFOS, Case, cases, error_cases

import lowbit_adam
import optstate_codecs
import optstate_wrap
import stochbf16
import turboadam

#: an optimizer that steps leaves has no graph
NO_GRAPH = {
    ("*", "*differentiable"): "torch's step writes to leaves that require gradients, and raises",
}


def every_input(subject):
    """With tensors for rates and betas where ours steps, and with all flags where torch's does."""
    if subject.coded:
        return cases(subject.like, "cuda")
    return cases(subject.like, flags=True)


@over(every_input, NO_SUCH_ARGUMENT, AMSGRAD_WITH_TENSORS, NO_GRAPH)
def test_steps_are_torchs(subject, case) -> None:
    """Bit by bit where formats are exact, and within what a format states elsewhere."""
    kwargs = {**case.kwargs, **subject.plus}
    compare(
        subject,
        lambda params: subject.make(params, **kwargs),
        lambda params: subject.exact(params, **kwargs),
    )


FLAGS = [
    Case(f"{flag}={value}", {flag: value})
    for flag, values in {
        "foreach": (None, False, True),
        "fused": (None, False, True),
        "capturable": (False, True),
        "differentiable": (False, True),
    }.items()
    for value in values
]
DIFFERENTIABLE = {("*", "differentiable=True"): Refused("differentiable=True: not supported")}


@over(lambda subject: FLAGS, DIFFERENTIABLE, subjects=[s for s in FAMILY if s.coded])
def test_flags_change_no_bit(subject, case) -> None:
    """Groups have the flags of torch's classes; the engine decides how to step."""
    flagged = Problem(subject, lambda p: subject.make(p, **case.kwargs))
    assert_equal(flagged.run(2).values(), after(subject, 2), "params")
    [(flag, value)] = case.kwargs.items()
    inner = getattr(flagged.optimizer, "inner", flagged.optimizer)
    assert inner.param_groups[0][flag] is value
    assert inner.defaults[flag] is value


RATES = [Case(f"{n} dimensions", {"lr": torch.full((1,) * n, 2.0**-7)}) for n in range(3)]


@over(lambda subject: RATES)
def test_rate_that_is_a_tensor(subject, case) -> None:
    """It steps as the number does, and a scheduler changes the tensor itself."""
    kwargs = {key: value.clone() for key, value in case.kwargs.items()}
    schedulers = {}

    def scheduled(optimizer):
        schedulers[optimizer] = ExponentialLR(optimizer, 0.5)
        return optimizer

    compare(
        subject,
        lambda params: scheduled(subject.make(params, **kwargs, **subject.plus)),
        lambda params: scheduled(subject.exact(params, **case.kwargs, **subject.plus)),
        between=lambda optimizer: schedulers[optimizer].step(),
    )
    assert next(iter(schedulers)).param_groups[0]["lr"] is kwargs["lr"]
    assert kwargs["lr"].shape == case.kwargs["lr"].shape
    assert float(kwargs["lr"]) == 2.0**-10


def tensors(*betas):
    return {"betas": tuple(torch.tensor(b) if isinstance(b, list) else b for b in betas)}


BETAS = [
    Case("both", tensors([0.875], [0.5])),
    Case("dimensions", tensors([[[0.875]]], [[0.5]])),
    Case("first", tensors([0.875], 0.5)),
    Case("second", tensors(0.875, [0.5])),
]
#: those with two betas
AVERAGES = [s for s in FAMILY if s.coded and "betas" in Problem(s, s.make).optimizer.defaults]
AVERAGES = [s for s in AVERAGES if "LPF" not in s.name]


@over(lambda subject: BETAS, subjects=AVERAGES)
def test_betas_that_are_tensors(subject, case) -> None:
    """They step as the numbers do, and one may be a tensor where the other is not."""
    given = Problem(subject, lambda p: subject.make(p, **case.kwargs))
    plain = Problem(subject, lambda p: subject.make(p, betas=(0.875, 0.5)))
    assert_equal(given.run(2).values(), plain.run(2).values(), "params")


#: torch refuses tensors with flags that decide nothing here
TAKEN = {
    "lr as Tensor doesn't work with foreach*": "test_rate_that_is_a_tensor",
    "betas*as a Tensor is not supported*foreach*": "test_betas_that_are_tensors",
    "betas must be either both floats or both Tensors*": "test_betas_that_are_tensors",
}
ERRORS_TAKEN = {
    (subject.name, which): f"tensors are taken, see {test}"
    for subject in FAMILY
    if subject.coded and subject.like in ("Adam", "AdamW")
    for which, test in TAKEN.items()
    # where betas are three, two are refused whatever they are
    if "LPF" not in subject.name or not which.startswith("betas")
}


@over(lambda subject: error_cases(subject.like), ERRORS_TAKEN)
def test_errors(subject, case) -> None:
    """What torch refuses is refused, in torch's words or by the argument's name."""
    params = [Parameter(normal((4, 3), 0).float())] if case.params is None else case.params

    def attempt() -> None:
        optimizer = subject.make(params, **case.kwargs)
        if case.at_step:
            optimizer.step()

    names = [key for key in case.kwargs if key != "lr" or len(case.kwargs) == 1]
    with pytest.raises((case.error, TypeError, ValueError, RuntimeError)) as caught:
        attempt()
    caught.match("|".join([case.says, *names]))


# that a class has without saying so
GENERATED = set(vars(type("Empty", (Optimizer,), {})))


def test_every_public_optimizer_takes_part() -> None:
    """And so does every class of torch's, in a wrapper; another name of a class is that class."""

    def renamed(found: type) -> bool:
        return own_attributes(found) <= {"__module__", "__doc__", "__slotnames__", *GENERATED}

    taking_part = {type(Problem(s, s.make).optimizer) for s in FAMILY if s.like in INFOS}
    public = {
        found
        for module in (lowbit_adam, turboadam, stochbf16, optstate_wrap, optstate_codecs)
        for name in module.__all__
        if isinstance(found := getattr(module, name), type) and issubclass(found, Optimizer)
    }
    assert len(public) > 15
    others = {found.__base__ if renamed(found) else found for found in public}
    assert len(public - others) == 4
    assert others <= taking_part
    assert {f"wrap-{name}" for name in INFOS} <= {subject.name for subject in FAMILY}


def test_every_case_is_accounted_for() -> None:
    account_for(__name__)
