"""A record of torch operations as loops over the blocks of a tensor.

The record is of a few *rows* of as many elements as the largest block has. A row of it becomes one
function in C. Numbers that belong to an element are computed in loops over the row; a reduction
ends a loop, since what depends on it needs all of the row. So loops have *levels*, and what is
needed at a later level than it was computed is kept in an array of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from optstate_codecs.engine.cpu.operations import (
    C_TYPES,
    OPERATIONS,
    bits_type,
    convert,
    literal,
)
from optstate_codecs.engine.cpu.record import Call, Node, Record, Unrecordable

__all__ = ["Lowered", "Value", "lower"]

# what a number belongs to: all of the call, a row, a pair of elements, or an element
ONE, ROW, PAIR, ELEMENT = range(4)
FINITE = "(__builtin_fabsf({0}) <= 3.402823466e38f)"
# these give one of their arguments, or its magnitude
TAKES_ONE = ("__builtin_fabsf(", "at_least(", "at_most(", "({1} < {0} ?", "({1} > {0} ?", "({0} ? ")
# of one number and constants other than 0 these give a number, and of finite ones too
ARITHMETIC = ("({0} + ", "({0} - ", "({1} - ", "({0} * ", "__builtin_fmaf(")
VIEWS = ("view", "slice", "detach", "alias", "unsqueeze", "expand", "_unsafe_view", "squeeze")


@dataclass(eq=False)
class Value:
    """A number in C, one for each of what it belongs to.

    Attributes:
        space: what it belongs to.
        dtype: in torch's terms.
        text: how to compute it, with {0}, {1} ... for ``needs``; of an input, its name.
        needs: other values.
        kind: "value"; "input"; "reduce", the largest of a row; or "low" and "high", the number of
            a pair's first or second element; "pair", an element's of two of its pair.
        level: of the loop that it is computed in.
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
class _Box:
    """What a tensor and its views hold now."""

    value: Value
    stale: bool = False
    seen: list[_Box] = field(default_factory=list)


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


def lower(record: Record, rows: int, block: int, *, fast: bool) -> Lowered:
    """Turn a record of ``rows`` rows of ``block`` elements into values.

    Args:
        record: what a function did.
        rows, block: its elements.
        fast: take shorter ways that give the same bits under further assumptions.

    Raises:
        Unrecordable: the record has an operation that has no form in C.
    """
    return _Lowering(record, rows, block, fast).run()


class _Lowering:
    def __init__(self, record: Record, rows: int, block: int, fast: bool) -> None:
        self._record, self._fast = record, fast
        self._assumed: list[Value] = []
        self._numbers: set[Value] = set()
        self._rows, self._block = rows, block
        self._boxes: dict[Node, _Box] = {}
        self._tables: dict[str, list[float]] = {}
        self._known: dict[Any, Value] = {}
        self._inputs: dict[str, tuple[_Box, Value]] = {}
        for name, node in record.inputs.items():
            value = Value(self._space(node), node.dtype, name, [], "input")
            box = self._boxes[node] = _Box(value)
            self._inputs[name] = (box, value)

    def _space(self, node: Node) -> int:
        whole = self._rows * self._block
        spaces = {1: ONE, self._rows: ROW, whole // 2: PAIR, whole: ELEMENT}
        if node.numel not in spaces:
            raise Unrecordable(f"{node.numel} elements in {self._rows} blocks of {self._block}")
        return spaces[node.numel]

    def run(self) -> Lowered:
        for call in self._record.calls:
            self._call(call)
        stores = {
            name: box.value
            for name, (box, value) in self._inputs.items()
            if box.value is not value
        }
        assumptions = [self._value(node) for node in self._record.assumptions]
        return Lowered(stores, assumptions + self._assumed, self._tables)

    def _value(self, node: Node) -> Value:
        if node.value is not None and node not in self._boxes:
            if node.numel != 1:
                raise Unrecordable(f"a constant of {node.numel} elements")
            text = literal(node.value.item(), node.dtype)
            self._boxes[node] = _Box(Value(ONE, node.dtype, text, []))
        box = self._boxes[node]
        if box.stale:
            raise Unrecordable("a tensor is read after its bits were changed as another dtype")
        return box.value

    def _make(self, space: int, dtype: torch.dtype, text: str, needs: list[Value], kind: str = "value") -> Value:
        """A value; the one there is where the same was computed before."""
        key = (space, dtype, text, tuple(map(id, needs)), kind)
        if key not in self._known:
            self._known[key] = Value(space, dtype, text, needs, kind)
        return self._known[key]

    def _call(self, call: Call) -> None:
        name, result = call.name, call.results[0]
        in_place = name.endswith("_") and not name.endswith("__") and name != "copy_"
        name = name[:-1] if in_place else name
        first = call.args[0] if call.args else None
        if name == "view" and call.overload == "dtype":
            self._bits(first, call.args[1], result)
        elif name in VIEWS:
            if name == "slice" and result.numel != first.numel:
                raise Unrecordable("a part of a tensor")
            self._value(first)
            self._boxes[result] = self._boxes[first]
        elif name == "copy_":
            self._store(first, self._convert(self._value(call.args[1]), first.dtype))
        elif name in ("unbind", "stack"):
            self._pairs(call)
        else:
            value = self._compute(name, call)
            target = call.kwargs.get("out", first if in_place or name[:3] == "__i" else None)
            if target is None:
                self._boxes[result] = _Box(value)
            else:
                self._store(target, self._convert(value, target.dtype))

    def _store(self, node: Node, value: Value) -> None:
        if node not in self._boxes:
            raise Unrecordable("a constant is changed")
        box = self._boxes[node]
        if box.stale or self._space(node) < value.space:
            raise Unrecordable("a tensor is changed through a narrower one")
        box.value = value
        for other in box.seen:
            other.stale = True

    def _bits(self, source: Node, dtype: torch.dtype, result: Node) -> None:
        value, box = self._value(source), self._boxes[source]
        text = bits_type("{0}", value.dtype, dtype)
        other = self._boxes[result] = _Box(self._make(value.space, dtype, text, [value]), seen=[box])
        box.seen.append(other)

    def _convert(self, value: Value, dtype: torch.dtype) -> Value:
        if value.dtype == dtype:
            return value
        return self._make(value.space, dtype, convert("{0}", value.dtype, dtype), [value])

    def _pairs(self, call: Call) -> None:
        """Two elements' codes into a byte, or out of one."""
        if call.name == "unbind":
            value = self._value(call.args[0])
            if len(call.results) != 2 or value.space != ELEMENT:
                raise Unrecordable("unbind")
            for kind, node in zip(("low", "high"), call.results, strict=True):
                self._boxes[node] = _Box(self._make(PAIR, value.dtype, "{0}", [value], kind))
            return
        values = [self._value(node) for node in call.args[0]]
        if len(values) != 2 or any(value.space != PAIR for value in values):
            raise Unrecordable("stack")
        value = self._make(ELEMENT, values[0].dtype, "", values, "pair")
        self._boxes[call.results[0]] = _Box(value)

    def _compute(self, name: str, call: Call) -> Value:
        dtype = call.results[0].dtype
        if name in ("zeros_like", "empty_like", "ones_like"):
            return self._make(ONE, dtype, literal(int(name == "ones_like"), dtype), [])
        if name == "_to_copy":
            return self._convert(self._value(call.args[0]), call.kwargs["dtype"])
        if name == "amax":
            value = self._value(call.args[0])
            if value.space != ELEMENT or dtype != torch.float32:
                raise Unrecordable("amax")
            return self._make(ROW, dtype, "{0}", [value], "reduce")
        if name == "index_select":
            return self._look_up(call)
        if name in ("where", "masked_fill"):
            return self._select(name, call)
        if name not in OPERATIONS:
            raise Unrecordable(name)
        return self._operation(name, call, dtype)

    def _look_up(self, call: Call) -> Value:
        table, dimension, index = call.args
        if table.value is None or dimension != 0:
            raise Unrecordable("index_select")
        name = f"table{len(self._tables)}"
        self._tables[name] = table.value.tolist()
        value = self._value(index)
        return self._make(value.space, torch.float32, name + "[{0}]", [value])

    def _select(self, name: str, call: Call) -> Value:
        dtype = call.results[0].dtype
        if name == "where":
            flag, yes, no = call.args
        else:
            no, flag, yes = call.args
        values = [self._value(flag), *(self._operand(x, dtype) for x in (yes, no))]
        space = max(value.space for value in values)
        return self._make(space, dtype, "({0} ? {1} : {2})", values)

    def _operand(self, given: Any, dtype: torch.dtype) -> Value:
        if isinstance(given, Node):
            return self._convert(self._value(given), dtype)
        return self._make(ONE, dtype, literal(given, dtype), [])

    def _operation(self, name: str, call: Call, dtype: torch.dtype) -> Value:
        nodes = [a for a in call.args if isinstance(a, Node)]
        within = dtype
        if dtype == torch.bool or name in ("lt", "le", "gt", "ge", "eq", "ne", "signbit"):
            within = nodes[0].dtype
            for node in nodes[1:]:
                within = torch.promote_types(within, node.dtype)
        if within in (torch.uint8, torch.int8, torch.int16):
            computed = torch.int32
        else:
            computed = within
        needs: list[Value] = []
        texts: list[str | None] = []
        for given in call.args:
            if given is None:
                texts.append(None)
                continue
            needs.append(self._operand(given, computed))
            texts.append("{%d}" % (len(needs) - 1))
        space = max(value.space for value in needs)
        if name == "mul" and computed == torch.bool and (flag := self._finite_flag(needs)):
            return flag
        if self._fast and space == ELEMENT and (shorter := self._shorter(name, needs)):
            return shorter
        if space == ELEMENT and any(value.space == PAIR for value in needs):
            raise Unrecordable("elements and pairs of them together")
        text = OPERATIONS[name](texts, call.kwargs, computed)
        result = torch.bool if dtype == torch.bool else computed
        return self._convert(self._make(space, result, text, needs), dtype)

    def _finite_flag(self, needs: list[Value]) -> Value | None:
        """``isfinite``, which torch makes of two comparisons, as one."""
        same, other = needs
        if (
            same.text == "({0} == {1})"
            and same.needs[0] is same.needs[1]
            and other.text == "({0} != {1})"
            and other.needs[0].text == "__builtin_fabsf({0})"
            and other.needs[0].needs[0] is same.needs[0]
            and other.needs[1].text == "__builtin_inff()"
        ):
            return self._make(same.space, torch.bool, FINITE, same.needs[:1])
        return None

    def _shorter(self, name: str, needs: list[Value]) -> Value | None:
        """The same bits without a root, a division, or a care for NaN.

        The root of a square is the magnitude, unless the square leaves the range of floats. A root
        divided by a number of the call is multiplied with its reciprocal and then corrected. Both
        take as long as ten other operations. What is known to be finite needs no NaN replaced, and
        no comparison that lets NaN through.
        """
        first = needs[0]
        if name == "sqrt" and first.text == "({0} * {1})" and first.needs[0] is first.needs[1]:
            root = self._make(ELEMENT, torch.float32, "__builtin_fabsf({0})", first.needs[:1])
            self._assume("(({0} == 0.0f) | (({0} >= 0x1p-63f) & ({0} <= 0x1p63f)))", root)
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
        if not others or value.text.startswith(TAKES_ONE):
            for need in others:
                self._assume_number(need)
        elif not value.text.startswith(ARITHMETIC):
            self._assume("({0} == {0})", value)
        elif len(others) == 1:
            self._assume_number(others[0])
        else:
            for need in others:
                self._assume(FINITE, need)

    def _assume(self, flag: str, value: Value) -> None:
        made = self._make(value.space, torch.bool, flag, [value])
        if made not in self._assumed:
            self._assumed.append(made)


def _is_constant(value: Value) -> bool:
    """Whether ``value`` is a number of the source, and neither 0 nor infinite."""
    return value.kind == "value" and not value.needs and value.text[:3] == "(0x"
