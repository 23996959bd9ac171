"""Peephole optimization: cheaper operations with the same bits under checked assumptions.

Nearly every block fulfils the assumptions. Roots and divisions take as long as ten other
operations, so:

- The root of a square becomes the magnitude, unless the square overflows or underflows.
- A root divided by a scalar becomes a product with the scalar's reciprocal, corrected by fused
  multiply-adds, which compute the product's error exactly.
- Values known to be finite need no ``nan_to_num``, and minima and maxima need not propagate NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch

from optstate_codecs.engine.cpu.value import ELEMENT, SCALAR, Value

__all__ = ["FINITE", "SQUARE_IN_RANGE", "Peephole", "finite_flag"]

FINITE = "(magnitude({0}) <= 3.402823466e38f)"
SQUARE_IN_RANGE = "(({0} == 0.0f) | (({0} >= 0x1p-63f) & ({0} <= 0x1p63f)))"
# the result is one of the operands, or its magnitude
TAKES_ONE = ("magnitude(", "at_least(", "at_most(", "lesser(", "greater(", "select_f(")
# of one operand that is not NaN and non-zero constants, or of finite operands, the result is not
# NaN
ARITHMETIC = ("({0} + ", "({0} - ", "({1} - ", "({0} * ", "fma_(")

Make = Callable[[Fraction, torch.dtype, str, list[Value]], Value]


class Peephole:
    """Rewrites operations and collects the assumptions of the rewrites.

    Attributes:
        assumptions: flags that must be set for every element and block.
    """

    def __init__(self, make: Make) -> None:
        self.assumptions: list[Value] = []
        self._make = make
        self._not_nan: set[Value] = set()

    def rewrite(self, name: str, needs: list[Value]) -> Value | None:
        """A cheaper form of the operation ``name`` on elements, or None where there is none."""
        first = needs[0]
        if name == "sqrt" and first.text == "({0} * {1})" and first.needs[0] is first.needs[1]:
            root = self._make(ELEMENT, torch.float32, "magnitude({0})", first.needs[:1])
            self._assume(SQUARE_IN_RANGE, root)
            return root
        if name == "div" and first.text.startswith("sqrt_") and needs[1].space == SCALAR:
            inverse = self._make(SCALAR, torch.float32, "(1.0f / {0})", needs[1:])
            self._assume(FINITE, first)
            return self._make(ELEMENT, torch.float32, "divide({0}, {1}, {2})", [*needs, inverse])
        if name == "nan_to_num":
            self._assume(FINITE, first)
            return first
        if name in ("minimum", "maximum") and first.dtype == torch.float32:
            # the first of these is the result where one of them is NaN
            needs = sorted(needs, key=_is_number)
            self._assume_not_nan(needs[1])
            text = "lesser({0}, {1})" if name == "minimum" else "greater({0}, {1})"
            return self._make(ELEMENT, torch.float32, text, needs)
        return None

    def _assume_not_nan(self, value: Value) -> None:
        """Assume that ``value`` is not NaN, by flags on the earliest operands that decide it."""
        if value in self._not_nan or value.dtype != torch.float32 or _is_number(value):
            return
        self._not_nan.add(value)
        others = [need for need in value.needs if not _is_constant(need)]
        if value.text.startswith(TAKES_ONE):
            for need in others:
                self._assume_not_nan(need)
        elif not value.text.startswith(ARITHMETIC):
            if not _is_constant(value):
                self._assume("({0} == {0})", value)
        elif len(others) == 1:
            self._assume_not_nan(others[0])
        else:
            for need in others:
                self._assume(FINITE, need)

    def _assume(self, flag: str, value: Value) -> None:
        made = self._make(value.space, torch.bool, flag, [value])
        if made not in self.assumptions:
            self.assumptions.append(made)


def _is_constant(value: Value) -> bool:
    """Whether ``value`` is a positive finite constant."""
    return value.kind == "value" and not value.needs and value.text.startswith("(0x")


def _is_number(value: Value) -> bool:
    """Whether ``value`` is never NaN: made of constants and integers."""
    if value.text.startswith("to_f({0}") and value.needs[0].dtype != torch.bfloat16:
        return True
    if not value.needs:
        return _is_constant(value) or value.text.startswith("(-0x")
    if not value.text.startswith(("select_f(", "({0} + ", "({0} - ", "({0} * ", "magnitude(")):
        return False
    # sums and products of few small numbers
    return all(_is_number(need) for need in value.needs if need.dtype == torch.float32)


def finite_flag(needs: list[Value], make: Make) -> Value | None:
    """Torch's ``isfinite``, ``x == x`` and ``abs(x) != inf``, as one comparison; else None."""
    same, other = needs
    if (
        same.text == "({0} == {1})"
        and same.needs[0] is same.needs[1]
        and other.text == "({0} != {1})"
        and other.needs[0].text == "magnitude({0})"
        and other.needs[0].needs[0] is same.needs[0]
        and other.needs[1].text == "__builtin_inff()"
    ):
        return make(same.space, torch.bool, FINITE, same.needs[:1])
    return None
