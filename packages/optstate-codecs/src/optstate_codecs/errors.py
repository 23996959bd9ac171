"""The error that is raised when a step fails part-way."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["StepError"]

Indices = Iterable[int]


class StepError(RuntimeError):
    """Raised when a step fails part-way, from the exception that stopped it.

    Attributes:
        stepped: indices, counted over all groups, of the parameters that were stepped.
        unstepped: indices of those that were not, and have not changed.
        torn: indices of those of which only some elements were stepped. This can happen to
            parameters larger than a chunk of offloaded state, or than what the reference steps at
            once.
    """

    def __init__(
        self, message: str, stepped: Indices, unstepped: Indices, torn: Indices = ()
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
        stepped: Indices,
        unstepped: Indices,
        torn: Indices = (),
    ) -> StepError:
        """The error for a step that ``error`` stopped, with a message that names the parameters."""
        lists = sorted(stepped), sorted(unstepped), sorted(torn)
        partly = f", parameters {_span(lists[2])} in a part of their elements" if lists[2] else ""
        return cls(
            f"step stopped{where}: {type(error).__name__}: {error}; parameters {_span(lists[0])} "
            f"have taken their step{partly}, parameters {_span(lists[1])} are as they were before "
            "it",
            *lists,
        )


def _span(numbers: list[int]) -> str:
    if not numbers:
        return "(none)"
    whole = len(numbers) == numbers[-1] - numbers[0] + 1
    return f"{numbers[0]} to {numbers[-1]}" if whole and len(numbers) > 1 else str(numbers)[1:-1]
