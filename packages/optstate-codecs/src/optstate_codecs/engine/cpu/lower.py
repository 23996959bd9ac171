"""Lowers a record of torch operations to a data-flow graph of scalar values.

The record is of a tensor of a few blocks. The generated function steps one block, so a tensor of
the record becomes a value for each element, group, row or tensor. A view shares the value of its
base, and an operation in place replaces it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from typing import Any

import torch

from optstate_codecs.engine.cpu.operations import OPERATIONS, bits_type, convert, literal
from optstate_codecs.engine.cpu.peephole import Peephole, finite_flag
from optstate_codecs.engine.cpu.record import Call, Node, Record, Unrecordable
from optstate_codecs.engine.cpu.value import ELEMENT, SCALAR, Lowered, Value, is_row

__all__ = ["lower"]

VIEWS = ("view", "slice", "detach", "alias", "unsqueeze", "expand", "_unsafe_view", "squeeze")
INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(eq=False)
class _Storage:
    """The current value of a tensor and its views.

    Attributes:
        aliases: views of the same memory in another dtype.
        stale: whether an alias was changed.
    """

    value: Value
    stale: bool = False
    aliases: list[_Storage] = field(default_factory=list)


def lower(record: Record, numel: int, *, fast: bool, torch_root: bool = False) -> Lowered:
    """Lower a record of a tensor of ``numel`` elements.

    With ``fast``, peephole rewrites add assumptions to those of the record. With ``torch_root``,
    roots are torch's, which are not rounded correctly.

    Raises:
        Unrecordable: an operation of the record has no form in C.
    """
    return _Lowering(record, numel, fast, torch_root).run()


def _low_bits(value: Value) -> Value:
    """The integer whose low 8 bits ``value``, a uint8 to store, has."""
    while value.text == "({0} & 255)" or (
        value.text == "({0} & {1})" and value.needs[1].text == "(255)"
    ):
        value = value.needs[0]
    return value


class _Lowering:
    def __init__(self, record: Record, numel: int, fast: bool, torch_root: bool) -> None:
        self._record, self._numel, self._torch_root = record, numel, torch_root
        self._peephole = Peephole(self._make) if fast else None
        self._storages: dict[Node, _Storage] = {}
        self._tables: dict[str, list[float]] = {}
        self._known: dict[Any, Value] = {}
        self._inputs: dict[str, tuple[_Storage, Value]] = {}
        for name, node in record.inputs.items():
            value = Value(self._space(node), node.dtype, name, [], "input")
            storage = self._storages[node] = _Storage(value)
            self._inputs[name] = (storage, value)

    def _space(self, node: Node) -> Fraction:
        space = Fraction(node.numel, self._numel) if node.numel != 1 else SCALAR
        if space > ELEMENT:
            raise Unrecordable(f"{node.numel} elements for {self._numel}")
        return space

    def run(self) -> Lowered:
        for call in self._record.calls:
            self._call(call)
        stores = {
            name: _low_bits(storage.value) if value.dtype == torch.uint8 else storage.value
            for name, (storage, value) in self._inputs.items()
            if storage.value is not value
        }
        assumptions = [self._value(node) for node in self._record.assumptions]
        if self._peephole:
            assumptions += self._peephole.assumptions
        return Lowered(stores, list(dict.fromkeys(assumptions)), self._tables)

    def _value(self, node: Node) -> Value:
        if node.value is not None and node not in self._storages:
            if node.numel != 1:
                raise Unrecordable(f"a constant of {node.numel} elements")
            text = literal(node.value.item(), node.dtype)
            self._storages[node] = _Storage(Value(SCALAR, node.dtype, text, []))
        storage = self._storages[node]
        if storage.stale:
            raise Unrecordable("a tensor is read after its bits were changed as another dtype")
        return storage.value

    def _make(
        self,
        space: Fraction,
        dtype: torch.dtype,
        text: str,
        needs: list[Value],
        kind: str = "value",
        lane: int = 0,
        lanes: int = 1,
    ) -> Value:
        """A new value, or the existing one of the same expression."""
        key = (space, dtype, text, tuple(map(id, needs)), kind, lane, lanes)
        if key not in self._known:
            self._known[key] = Value(space, dtype, text, needs, kind, lane, lanes)
        return self._known[key]

    def _call(self, call: Call) -> None:
        name, result = call.name, call.results[0]
        in_place = name.endswith("_") and not name.endswith("__") and name != "copy_"
        name = name[:-1] if in_place else name
        first = call.args[0]
        if name == "view" and call.overload == "dtype":
            self._bits(first, call.args[1], result)
        elif name in VIEWS:
            if name == "slice" and result.numel != first.numel:
                raise Unrecordable("a part of a tensor")
            self._value(first)
            self._storages[result] = self._storages[first]
        elif name == "copy_":
            self._store(first, self._convert(self._value(call.args[1]), first.dtype))
        elif name in ("unbind", "stack"):
            self._lanes(call)
        else:
            value = self._compute(name, call)
            target = call.kwargs.get("out", first if in_place or name[:3] == "__i" else None)
            if target is None:
                self._storages[result] = _Storage(value)
            else:
                self._store(target, self._convert(value, target.dtype))

    def _store(self, node: Node, value: Value) -> None:
        if node not in self._storages:
            raise Unrecordable("a constant is changed")
        storage = self._storages[node]
        if storage.stale or self._space(node) < value.space:
            raise Unrecordable("a tensor is changed through a narrower one")
        storage.value = value
        for alias in storage.aliases:
            alias.stale = True

    def _bits(self, source: Node, dtype: torch.dtype, result: Node) -> None:
        value, storage = self._value(source), self._storages[source]
        text = bits_type("{0}", value.dtype, dtype)
        viewed = self._make(value.space, dtype, text, [value])
        alias = self._storages[result] = _Storage(viewed, aliases=[storage])
        storage.aliases.append(alias)

    def _convert(self, value: Value, dtype: torch.dtype) -> Value:
        if value.dtype == dtype:
            return value
        return self._make(value.space, dtype, convert("{0}", value.dtype, dtype), [value])

    def _lanes(self, call: Call) -> None:
        """``stack`` and ``unbind`` of neighbours, which pack and unpack the codes of a byte."""
        if call.args[1:] not in ((1,), (-1,)):
            raise Unrecordable(call.name)
        if call.name == "unbind":
            value, lanes = self._value(call.args[0]), len(call.results)
            if value.dtype not in INTEGERS or is_row(value.space / lanes):
                raise Unrecordable("unbind")
            for lane, node in enumerate(call.results):
                made = ("{0}", [value], "lane", lane, lanes)
                self._storages[node] = _Storage(self._make(value.space / lanes, value.dtype, *made))
            return
        values = [self._value(node) for node in call.args[0]]
        first = values[0]
        if any((v.space, v.dtype) != (first.space, first.dtype) or is_row(v.space) for v in values):
            raise Unrecordable("stack")
        if first.dtype not in INTEGERS:
            raise Unrecordable("stack")
        value = self._make(first.space * len(values), first.dtype, "", values, "join")
        self._storages[call.results[0]] = _Storage(value)

    def _compute(self, name: str, call: Call) -> Value:
        dtype = call.results[0].dtype
        if name in ("zeros_like", "empty_like", "ones_like"):
            return self._make(SCALAR, dtype, literal(int(name == "ones_like"), dtype), [])
        if name in ("_to_copy", "clone"):
            return self._convert(self._value(call.args[0]), dtype)
        if name in ("full_like", "full"):
            return self._make(SCALAR, dtype, literal(call.args[1], dtype), [])
        if name in ("amax", "sum"):
            value, space = self._value(call.args[0]), self._space(call.results[0])
            if value.space != ELEMENT or not is_row(space) or space == 0 or dtype != torch.float32:
                raise Unrecordable(name)
            return self._make(space, dtype, "{0}", [value], "largest" if name == "amax" else "sum")
        if name == "index_select":
            return self._look_up(call)
        if name == "sqrt" and self._torch_root:
            value = self._value(call.args[0])
            return self._make(value.space, dtype, "{0}", [value], "root")
        if name == "bucketize":
            return self._bucket(call)
        if name in ("where", "masked_fill"):
            return self._select(name, call)
        if name not in OPERATIONS:
            raise Unrecordable(name)
        return self._operation(name, call, dtype)

    def _look_up(self, call: Call) -> Value:
        table, dimension, index = call.args
        if table.value is None or dimension != 0:
            raise Unrecordable("index_select")
        values = table.value.tolist()
        name = f"table_{zlib.crc32(repr(values).encode()):x}"
        self._tables[name] = values
        value = self._value(index)
        return self._make(value.space, torch.float32, f"look_up({name}, {{0}})", [value])

    def _bucket(self, call: Call) -> Value:
        """How many of the ascending boundaries are below a value; all for NaN."""
        value, boundaries = self._value(call.args[0]), call.args[1].value
        if boundaries is None or call.args[2:] or call.kwargs.get("right"):
            raise Unrecordable("bucketize")
        terms = [
            f"select_i({{0}} <= {literal(boundary, torch.float32)}, 0, 1)"
            for boundary in boundaries.tolist()
        ]
        return self._make(value.space, torch.int32, f"({' + '.join(terms)})", [value])

    def _select(self, name: str, call: Call) -> Value:
        dtype = call.results[0].dtype
        if name == "where":
            flag, yes, no = call.args
        else:
            no, flag, yes = call.args
        values = [self._value(flag), *(self._operand(x, dtype) for x in (yes, no))]
        space = max(value.space for value in values)
        select = "select_f" if dtype == torch.float32 else "select_i"
        return self._make(space, dtype, f"{select}({{0}}, {{1}}, {{2}})", values)

    def _operand(self, arg: Any, dtype: torch.dtype) -> Value:
        if isinstance(arg, Node):
            return self._convert(self._value(arg), dtype)
        return self._make(SCALAR, dtype, literal(arg, dtype), [])

    def _operation(self, name: str, call: Call, dtype: torch.dtype) -> Value:
        nodes = [a for a in call.args if isinstance(a, Node)]
        computed = dtype
        if dtype == torch.bool:
            computed = reduce(torch.promote_types, (node.dtype for node in nodes))
        if computed in (torch.uint8, torch.int8, torch.int16):
            computed = torch.int32
        needs: list[Value] = []
        texts: list[str | None] = []
        for arg in call.args:
            if arg is None:
                texts.append(None)
                continue
            needs.append(self._operand(arg, computed))
            texts.append(f"{{{len(needs) - 1}}}")
        space = max(value.space for value in needs)
        if name == "mul" and computed == torch.bool and (flag := finite_flag(needs, self._make)):
            return flag
        if self._peephole and space == ELEMENT and (cheaper := self._peephole.rewrite(name, needs)):
            return cheaper
        if any(value.space != space and not is_row(value.space) for value in needs):
            raise Unrecordable("elements and groups of them together")
        if name == "addcmul" and any(need.space == SCALAR for need in needs[1:]):
            name = "add_scaled"
        text = OPERATIONS[name](texts, call.kwargs, computed)
        result = torch.bool if dtype == torch.bool else computed
        return self._convert(self._make(space, result, text, needs), dtype)
