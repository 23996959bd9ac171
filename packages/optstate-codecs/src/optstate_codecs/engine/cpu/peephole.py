"""Shorter ways to the same bits, under assumptions that nearly every row fulfils.

The root of a square is the magnitude, unless the square leaves the range of floats. A root divided
by a number of the call is multiplied with the reciprocal and then corrected: the product is off by
an ulp or so, the fused multiply-adds know by how much. Roots and divisions take as long as ten
other operations. And what is known to be finite needs no NaN replaced, and no comparison that lets
a NaN through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from optstate_codecs.engine.cpu.value import ELEMENT, ONE, Value

__all__ = ["FINITE", "Shortening", "finite_flag"]

FINITE = "(__builtin_fabsf({0}) <= 3.402823466e38f)"
SQUARE_IN_RANGE = "(({0} == 0.0f) | (({0} >= 0x1p-63f) & ({0} <= 0x1p63f)))"
# these give one of their arguments, or its magnitude
TAKES_ONE = ("__builtin_fabsf(", "at_least(", "at_most(", "({1} < {0} ?", "({1} > {0} ?", "({0} ? ")
# of one number and constants other than 0 these give a number, and of finite ones too
ARITHMETIC = ("({0} + ", "({0} - ", "({1} - ", "({0} * ", "__builtin_fmaf(")

Make = Callable[[int, torch.dtype, str, list[Value]], Value]


class Shortening:
    """Finds shorter ways and collects what they assume.

    Attributes:
        assumptions: flags that must be set for every element and row.
    """

    def __init__(self, make: Make) -> None:
        self.assumptions: list[Value] = []
        self._make = make
        self._numbers: set[Value] = set()

    def shorter(self, name: str, needs: list[Value]) -> Value | None:
        """The operation ``name`` on elements, or None where it stays as it is."""
        first = needs[0]
        if name == "sqrt" and first.text == "({0} * {1})" and first.needs[0] is first.needs[1]:
            root = self._make(ELEMENT, torch.float32, "__builtin_fabsf({0})", first.needs[:1])
            self._assume(SQUARE_IN_RANGE, root)
            return root
        if name == "div" and first.text.startswith("__builtin_sqrtf") and needs[1].space == ONE:
            inverse = self._make(ONE, torch.float32, "(1.0f / {0})", needs[1:])
            self._assume(FINITE, first)
            return self._make(ELEMENT, torch.float32, "divide({0}, {1}, {2})", [*needs, inverse])
        if name == "nan_to_num":
            self._assume(FINITE, first)
            return first
        if name in ("minimum", "maximum") and first.dtype == torch.float32:
            for value in needs:
                self._assume_number(value)
            sign = "<" if name == "minimum" else ">"
            text = f"({{1}} {sign} {{0}} ? {{1}} : {{0}})"
            return self._make(ELEMENT, torch.float32, text, needs)
        return None

    def _assume_number(self, value: Value) -> None:
        """Assume, as early as that can be said, what keeps ``value`` from being NaN."""
        if value in self._numbers or value.dtype != torch.float32:
            return
        self._numbers.add(value)
        others = [need for need in value.needs if not _is_constant(need)]
        if value.text.startswith(TAKES_ONE):
            for need in others:
                self._assume_number(need)
        elif not value.text.startswith(ARITHMETIC):
            if not _is_constant(value):
                self._assume("({0} == {0})", value)
        elif len(others) == 1:
            self._assume_number(others[0])
        else:
            for need in others:
                self._assume(FINITE, need)

    def _assume(self, flag: str, value: Value) -> None:
        made = self._make(value.space, torch.bool, flag, [value])
        if made not in self.assumptions:
            self.assumptions.append(made)


def _is_constant(value: Value) -> bool:
    """Whether ``value`` is a positive number of the source, and finite."""
    return value.kind == "value" and not value.needs and value.text.startswith("(0x")


def finite_flag(needs: list[Value], make: Make) -> Value | None:
    """``isfinite``, which torch makes of ``x == x`` and ``abs(x) != inf``, as one comparison."""
    same, other = needs
    if (
        same.text == "({0} == {1})"
        and same.needs[0] is same.needs[1]
        and other.text == "({0} != {1})"
        and other.needs[0].text == "__builtin_fabsf({0})"
        and other.needs[0].needs[0] is same.needs[0]
        and other.needs[1].text == "__builtin_inff()"
    ):
        return make(same.space, torch.bool, FINITE, same.needs[:1])
    return None
