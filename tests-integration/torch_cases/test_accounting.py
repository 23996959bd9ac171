"""The accounting itself: an outcome that is not the expected one is a failure."""

import accounting
import pytest
from accounting import PROPERTY, Refused, over
from family import FAMILY
from torch_inputs import Case

CASES = [Case("good", {"error": None}), Case("bad", {"error": ValueError("lr: too fast")})]
SUBJECT = FAMILY[0]


def outcome(expected):
    """What a test of both cases says, with these expectations."""

    def body(subject, case) -> None:
        if case.kwargs["error"]:
            raise case.kwargs["error"]

    # its plan must not count as one of this module's
    body.__module__ = "nowhere"
    noted = {}
    test = over(lambda subject: CASES, expected, subjects=[SUBJECT])(body)
    test(SUBJECT, lambda name, value: noted.update({name: value}))
    return noted[PROPERTY]


@pytest.mark.parametrize("expected", [Refused("lr: too"), "not for this one"], ids=repr)
def test_an_expected_outcome_is_counted(expected) -> None:
    kind = "refused" if isinstance(expected, Refused) else "not applicable"
    assert outcome({("*", "bad"): expected}) == {"passed": 1, kind: 1}


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        ({}, "bad: ValueError: lr: too fast"),
        ({("*", "bad"): Refused("eps: ")}, "bad: must be Refused.*but is ValueError"),
        ({("*", "bad"): Refused("lr: ", (TypeError,))}, "bad: must be Refused.*but is ValueError"),
        ({("*", "*"): "not for any"}, "good: listed as 'not for any', but passes"),
    ],
    ids=["unlisted", "other words", "other type", "passes"],
)
def test_another_outcome_is_a_failure(expected, says) -> None:
    with pytest.raises(AssertionError, match=says):
        outcome(expected)


def test_an_entry_that_no_case_matches_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(accounting, "CURRENT", True)
    with pytest.raises(ValueError, match=r"no case matches .*'ugly'"):
        outcome({("*", "bad"): Refused("lr"), ("*", "ugly"): "unknown"})
