"""Values: the nodes of the data-flow graph that lowering makes and code generation prints."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from optstate_codecs.engine.cpu.operations import C_TYPES
from optstate_codecs.engine.cpu.record import Unrecordable

__all__ = ["ELEMENT", "SCALAR", "SHORTEST_ROW", "Lowered", "Value", "is_row"]

# spaces: entries for each element. SCALAR stands for one value for the whole tensor; below 1 are
# groups of elements, whose codes share bytes, and rows of at least SHORTEST_ROW elements
SCALAR, ELEMENT = Fraction(0), Fraction(1)
SHORTEST_ROW = 16


def is_row(space: Fraction) -> bool:
    """Whether values of a space are the same for a whole row of elements."""
    return space <= Fraction(1, SHORTEST_ROW)


@dataclass(eq=False)
class Value:
    """A C expression, evaluated once for each member of its space.

    Attributes:
        space: as above.
        dtype: in torch's terms.
        text: the expression, with {0}, {1} ... for ``needs``; the name of an input.
        needs: operands.
        kind: "value"; "input"; "largest" and "sum", the largest magnitude and the sum of a row;
            "root", which a function of torch's computes for a whole block; "lane", every
            ``lanes``-th of the operand's values from number ``lane`` on; or "join", the values of
            which the operands are the lanes.
        lane, lanes: of a "lane".
        level: the loop that computes it. A value that needs a whole row, or values of another
            space, is computed one level later.
    """

    space: Fraction
    dtype: torch.dtype
    text: str
    needs: list[Value]
    kind: str = "value"
    lane: int = 0
    lanes: int = 1
    level: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in C_TYPES:
            raise Unrecordable(f"numbers of {self.dtype}")
        for need in self.needs:
            across = not is_row(need.space) and need.space != self.space and not self.is_late
            self.level = max(self.level, need.level + (need.is_late or across))

    @property
    def is_late(self) -> bool:
        """Whether it is computed after the loops of its level, of all values of a row or block."""
        return self.kind in ("largest", "sum", "root")


@dataclass(eq=False)
class Lowered:
    """A record as a graph of values.

    Attributes:
        stores: the final value of each input that changes, by name.
        assumptions: flags that must all be set.
        tables: lookup tables, by name.
    """

    stores: dict[str, Value]
    assumptions: list[Value]
    tables: dict[str, list[float]]
