"""The numbers that loops are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optstate_codecs.engine.cpu.operations import C_TYPES
from optstate_codecs.engine.cpu.record import Unrecordable

__all__ = ["ELEMENT", "ONE", "PAIR", "ROW", "Lowered", "Value"]

# what a number belongs to: all of the call, a row, a pair of elements, or an element
ONE, ROW, PAIR, ELEMENT = range(4)


@dataclass(eq=False)
class Value:
    """A number in C, one for each of what it belongs to.

    Attributes:
        space: what it belongs to.
        dtype: in torch's terms.
        text: how to compute it, with {0}, {1} ... for ``needs``; of an input, its name.
        needs: other values.
        kind: "value"; "input"; "reduce", the largest magnitude of a row; "low" and "high", the
            number of a pair's first or second element; or "pair", an element's, out of two that
            its pair has.
        level: of the loop that computes it. What needs all of a row, or numbers of another loop,
            comes a level later.
    """

    space: int
    dtype: torch.dtype
    text: str
    needs: list[Value]
    kind: str = "value"
    level: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in C_TYPES:
            raise Unrecordable(f"numbers of {self.dtype}")
        for need in self.needs:
            across = need.space > ROW and need.space != self.space and self.kind != "reduce"
            self.level = max(self.level, need.level + (need.kind == "reduce" or across))


@dataclass(eq=False)
class Lowered:
    """A record as values.

    Attributes:
        stores: what inputs hold in the end, by name, where they change.
        assumptions: flags that must all be set.
        tables: constants that are looked up in, by name.
    """

    stores: dict[str, Value]
    assumptions: list[Value]
    tables: dict[str, list[float]]
