"""What a step raises that stopped part of the way."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["StepError"]


class StepError(RuntimeError):
    """A step that stopped part of the way; its cause is the exception it was raised from.

    Attributes:
        stepped: numbers of the parameters, counted over all groups, that have taken their step.
        unstepped: numbers of those that have not, and are as they were before.
        torn: numbers of those that have taken it in a part of their elements only, which can be
            where a parameter is larger than a chunk of state that is elsewhere.
    """

    def __init__(
        self,
        message: str,
        stepped: Iterable[int],
        unstepped: Iterable[int],
        torn: Iterable[int] = (),
    ) -> None:
        super().__init__(message)
        self.stepped = list(stepped)
        self.unstepped = list(unstepped)
        self.torn = list(torn)

    @classmethod
    def of(
        cls,
        error: BaseException,
        where: str,
        stepped: Iterable[int],
        unstepped: Iterable[int],
        torn: Iterable[int] = (),
    ) -> StepError:
        """The error that says how far a step came that ``error`` stopped."""
        lists = sorted(stepped), sorted(unstepped), sorted(torn)
        parted = f", parameters {_span(lists[2])} in a part of their elements" if lists[2] else ""
        return cls(
            f"step stopped{where}: {type(error).__name__}: {error}; parameters {_span(lists[0])} "
            f"have taken their step{parted}, parameters {_span(lists[1])} are as they were before "
            "it",
            *lists,
        )


def _span(numbers: list[int]) -> str:
    if not numbers:
        return "(none)"
    whole = len(numbers) == numbers[-1] - numbers[0] + 1
    return f"{numbers[0]} to {numbers[-1]}" if whole and len(numbers) > 1 else str(numbers)[1:-1]
