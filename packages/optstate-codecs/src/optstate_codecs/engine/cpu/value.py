"""Values: the nodes of the data-flow graph that lowering makes and code generation prints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optstate_codecs.engine.cpu.operations import C_TYPES
from optstate_codecs.engine.cpu.record import Unrecordable

__all__ = ["BLOCK", "ELEMENT", "PAIR", "SCALAR", "Lowered", "Value"]

# spaces: whether there is one value for the whole tensor, or one a block, a pair of elements or
# an element
SCALAR, BLOCK, PAIR, ELEMENT = range(4)


@dataclass(eq=False)
class Value:
    """A C expression, evaluated once for each member of its space.

    Attributes:
        space: one of the four above.
        dtype: in torch's terms.
        text: the expression, with {0}, {1} ... for ``needs``; the name of an input.
        needs: operands.
        kind: "value"; "input"; "reduce", the largest magnitude of a block; "low" and "high", the
            operand's value at a pair's first or second element; or "pair", an element's value out
            of the two that its pair has.
        level: the loop that computes it. A value that needs a whole block, or values of another
            space, is computed one level later.
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
            across = need.space > BLOCK and need.space != self.space and self.kind != "reduce"
            self.level = max(self.level, need.level + (need.kind == "reduce" or across))


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
