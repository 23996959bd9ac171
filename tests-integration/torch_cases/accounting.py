"""Runs a test body over every optimizer and case, and accounts for what each of them does."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from family import FAMILY, Subject
from torch_inputs import INFOS, Case

__all__ = ["PROPERTY", "Refused", "account_for", "over"]

PROPERTY = "torch cases"


@dataclass(frozen=True)
class Refused:
    """An error that names what is not taken.

    Attributes:
        says: what its message matches.
        kinds: of which types it may be.
    """

    says: str
    kinds: tuple[type[Exception], ...] = (TypeError, ValueError)


#: by optimizer and case, as patterns: what is refused, or why the case does not apply
Expected = Mapping[tuple[str, str], "Refused | str"]
# of other releases, torch's cases are others
CURRENT = torch.__version__.startswith("2.13.")
Plan = list[tuple[Case, "Refused | str | None"]]

ONE = [Case("default", {})]
_plans: dict[tuple[str, str], dict[str, Plan]] = {}


def over(
    cases: Callable[[Subject], Sequence[Case]] = lambda subject: ONE,
    *expected: Expected,
    subjects: Sequence[Subject] = FAMILY,
) -> Callable[[Callable[[Subject, Case], None]], Callable[..., None]]:
    """Make a test of a body that takes an optimizer and a case, and raises if all is not well.

    Cases that do not apply are run, too, and have to fail: an entry that is not needed is an error.
    So is one that no case matches, with the torch that CI tests with.

    Args:
        cases: those that an optimizer is put through.
        *expected: what does not pass; of entries that match the same case the first counts.
        subjects: the optimizers.
    """
    present = [subject for subject in subjects if subject.like in INFOS]
    entries = [entry for table in expected for entry in table.items()]

    def find(subject: Subject, case: Case) -> Refused | str | None:
        for (whose, which), outcome in entries:
            if fnmatchcase(subject.name, whose) and fnmatchcase(case.name, which):
                used.add((whose, which))
                return outcome
        return None

    used: set[tuple[str, str]] = set()
    plans = {s.name: [(case, find(s, case)) for case in cases(s)] for s in present}
    unused = [key for key, _ in entries if key not in used] if CURRENT else []

    def decorate(body: Callable[[Subject, Case], None]) -> Callable[..., None]:
        if unused:
            raise ValueError(f"{body.__name__}: no case matches {unused}")
        _plans[body.__module__, body.__name__] = plans

        @pytest.mark.parametrize("subject", subjects, ids=lambda subject: subject.name)
        def test(subject: Subject, record_property: Callable[[str, Any], None]) -> None:
            if subject.name not in plans:
                pytest.skip(f"this torch has no cases of {subject.like}")
            counts, problems = _run(body, subject, plans[subject.name])
            record_property(PROPERTY, counts)
            if problems:
                first = problems[0][1]
                raise AssertionError("\n  ".join(said for said, _ in problems)) from first

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


def _run(
    body: Callable[[Subject, Case], None], subject: Subject, plan: Plan
) -> tuple[dict[str, int], list[tuple[str, BaseException | None]]]:
    """How many cases did what, and what was not as expected."""
    counts = Counter[str]()
    problems: list[tuple[str, BaseException | None]] = []
    for case, expected in plan:
        raised: BaseException | None = None
        try:
            body(subject, case)
        except (Exception, pytest.fail.Exception) as error:
            raised = error
        if said := _judge(expected, raised):
            problems.append((f"{case.name}: {said}", raised))
        counts[_outcome(expected)] += 1
    return dict(counts), problems


def _judge(expected: Refused | str | None, raised: BaseException | None) -> str:
    """What is wrong with that outcome."""
    if expected is None:
        return f"{type(raised).__name__}: {raised}" if raised else ""
    if raised is None:
        return f"listed as {expected!r}, but passes"
    if isinstance(expected, str):
        return ""
    if not isinstance(raised, expected.kinds) or not re.search(expected.says, str(raised)):
        return f"must be {expected}, but is {type(raised).__name__}: {raised}"
    return ""


def _outcome(expected: Refused | str | None) -> str:
    if expected is None:
        return "passed"
    return "not applicable" if isinstance(expected, str) else "refused"


def account_for(module: str) -> None:
    """Check that every optimizer passes some cases of a module's tests, and print the counts."""
    plans = {name: plan for (where, name), plan in _plans.items() if where == module}
    assert plans
    totals = Counter[str]()
    for subject in FAMILY:
        if subject.like not in INFOS:
            continue
        of = [item for plan in plans.values() for item in plan.get(subject.name, ())]
        counts = Counter(_outcome(expected) for _, expected in of)
        assert counts["passed"], f"{subject.name} passes no case of {module}"
        totals.update(counts)
    reasons = Counter(
        expected
        for plan in plans.values()
        for items in plan.values()
        for _, expected in items
        if isinstance(expected, str)
    )
    lines = [f"{name}: {count}" for name, count in sorted(totals.items())]
    lines += [f"  {count} not applicable: {reason}" for reason, count in sorted(reasons.items())]
    sys.stdout.write("\n".join(lines) + "\n")
