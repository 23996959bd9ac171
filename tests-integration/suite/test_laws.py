"""Every law for every public optimizer at every point, but for what ``exclusions`` names."""

from pathlib import Path

import pytest

from suite.cases import Case, every_case, excluded
from suite.configurations import configurations

ALL = every_case(configurations())
CASES = [case for case in ALL if excluded(case) is None]


def marks(case: Case) -> list[pytest.MarkDecorator]:
    found = [] if case.lean else [pytest.mark.thorough]
    if case.point.device == "cuda":
        found.append(pytest.mark.cuda)
    elif case.interpreted:
        found.append(pytest.mark.interpret)
    return found


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=marks(case)) for case in CASES]
)
def test_law(case: Case, tmp_path: Path) -> None:
    with case.subject(tmp_path) as subject:
        case.law(subject)
