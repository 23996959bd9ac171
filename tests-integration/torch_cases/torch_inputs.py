"""PyTorch's own optimizer cases, read from the ``OptimizerInfo`` table that ships in torch."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch

__all__ = ["INFOS", "Case", "ErrorCase", "cases", "error_cases", "schedulers"]

FLAGS = ("foreach", "fused", "differentiable")


def _imported() -> ModuleType:
    """The module with the table, without what importing it does to the process.

    It freezes ``torch.backends``, loads a profile of hypothesis and, in older releases, reads
    ``sys.argv`` and seeds the generators.
    """
    pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        pytest.MonkeyPatch.context() as patch,
    ):
        warnings.simplefilter("ignore")
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        patch.setitem(sys.modules, "hypothesis", None)
        patch.setattr(sys, "argv", sys.argv[:1])
        from torch.testing._internal import common_optimizers
    return common_optimizers


_common = _imported()
#: by class name; older releases of torch lack some
INFOS: dict[str, Any] = {info.optim_cls.__name__: info for info in _common.optim_db}


@dataclass(frozen=True)
class Case:
    """One combination of keyword arguments.

    Attributes:
        name: torch's description of it.
        kwargs: of torch's class.
    """

    name: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class ErrorCase(Case):
    """Arguments that torch refuses.

    Attributes:
        params: the parameters or groups, None where any will do.
        error: the type that torch raises.
        says: what its message matches.
        at_step: whether it is the step that raises.
    """

    params: Any
    error: type[Exception]
    says: str
    at_step: bool


AnyCase = TypeVar("AnyCase", bound=Case)


def cases(like: str, device: str = "cpu", flags: bool = False) -> list[Case]:
    """Every combination of arguments that torch tests its class ``like`` with.

    Args:
        like: the name of the class.
        device: "cuda" adds those with ``capturable``, and with rates and betas that are tensors.
        flags: also with each of the flags ``foreach``, ``fused`` and ``differentiable`` that the
            class has.
    """
    info = INFOS[like]
    found = [Case(i.desc, dict(i.kwargs)) for i in info.optim_inputs_func(device=device)]
    if flags:
        found += [
            Case(f"{case.name}, {flag}", {**case.kwargs, flag: True})
            for flag in FLAGS
            if flag in info.supported_impls
            for case in list(found)
        ]
    return _named(found)


def error_cases(like: str) -> list[ErrorCase]:
    """Every combination of arguments that torch's class ``like`` has to refuse."""
    construction = _common.OptimizerErrorEnum.CONSTRUCTION_ERROR
    found = []
    for error in INFOS[like].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        says, at_step = error.error_regex, error.error_on is not construction
        kind = error.error_type
        found.append(ErrorCase(given.desc, dict(given.kwargs), given.params, kind, says, at_step))
    return _named(found)


def _named(found: list[AnyCase]) -> list[AnyCase]:
    """The same with names of their own."""
    seen = Counter[str]()
    named = []
    for case in found:
        seen[case.name] += 1
        number = seen[case.name]
        named.append(case if number == 1 else replace(case, name=f"{case.name} ({number})"))
    return named


def schedulers(like: str) -> list[list[Callable[..., Any]]]:
    """Combinations of learning rate schedulers that torch tests its class ``like`` with."""
    return [list(makers) for makers in INFOS[like].scheduler_inputs]
