"""Lowers a record of torch operations to a data-flow graph of scalar values.

The record is of a tensor of a few blocks. The generated function steps one block, so a tensor of
the record becomes a value for each element, pair, block or tensor. A view shares the value of its
base, and an operation in place replaces it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch

from optstate_codecs.engine.cpu.operations import OPERATIONS, bits_type, convert, literal
from optstate_codecs.engine.cpu.peephole import Peephole, finite_flag
from optstate_codecs.engine.cpu.record import Call, Node, Record, Unrecordable
from optstate_codecs.engine.cpu.value import BLOCK, ELEMENT, PAIR, SCALAR, Lowered, Value

__all__ = ["lower"]

VIEWS = ("view", "slice", "detach", "alias", "unsqueeze", "expand", "_unsafe_view", "squeeze")


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


def lower(record: Record, blocks: int, block_size: int, *, fast: bool) -> Lowered:
    """Lower a record of ``blocks`` blocks of ``block_size`` elements.

    With ``fast``, peephole rewrites add assumptions to those of the record.

    Raises:
        Unrecordable: an operation of the record has no form in C.
    """
    return _Lowering(record, blocks, block_size, fast).run()


class _Lowering:
    def __init__(self, record: Record, blocks: int, block_size: int, fast: bool) -> None:
        self._record = record
        self._peephole = Peephole(self._make) if fast else None
        self._blocks, self._block_size = blocks, block_size
        self._storages: dict[Node, _Storage] = {}
        self._tables: dict[str, list[float]] = {}
        self._known: dict[Any, Value] = {}
        self._inputs: dict[str, tuple[_Storage, Value]] = {}
        for name, node in record.inputs.items():
            value = Value(self._space(node), node.dtype, name, [], "input")
            storage = self._storages[node] = _Storage(value)
            self._inputs[name] = (storage, value)

    def _space(self, node: Node) -> int:
        blocks, size = self._blocks, self._block_size
        whole = blocks * size
        spaces = {1: SCALAR, blocks: BLOCK, whole // 2: PAIR, whole: ELEMENT}
        if node.numel not in spaces:
            raise Unrecordable(f"{node.numel} elements in {blocks} blocks of {size}")
        return spaces[node.numel]

    def run(self) -> Lowered:
        for call in self._record.calls:
            self._call(call)
        stores = {
            name: storage.value
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
        self, space: int, dtype: torch.dtype, text: str, needs: list[Value], kind: str = "value"
    ) -> Value:
        """A new value, or the existing one of the same expression."""
        key = (space, dtype, text, tuple(map(id, needs)), kind)
        if key not in self._known:
            self._known[key] = Value(space, dtype, text, needs, kind)
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
            self._pairs(call)
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

    def _pairs(self, call: Call) -> None:
        """``stack`` and ``unbind`` of two elements, which pack and unpack the codes of a byte."""
        if call.args[1:] not in ((1,), (-1,)):
            raise Unrecordable(call.name)
        if call.name == "unbind":
            value = self._value(call.args[0])
            if len(call.results) != 2 or value.space != ELEMENT:
                raise Unrecordable("unbind")
            for kind, node in zip(("low", "high"), call.results, strict=True):
                self._storages[node] = _Storage(self._make(PAIR, value.dtype, "{0}", [value], kind))
            return
        values = [self._value(node) for node in call.args[0]]
        if len(values) != 2 or any(value.space != PAIR for value in values):
            raise Unrecordable("stack")
        value = self._make(ELEMENT, values[0].dtype, "", values, "pair")
        self._storages[call.results[0]] = _Storage(value)

    def _compute(self, name: str, call: Call) -> Value:
        dtype = call.results[0].dtype
        if name in ("zeros_like", "empty_like", "ones_like"):
            return self._make(SCALAR, dtype, literal(int(name == "ones_like"), dtype), [])
        if name in ("_to_copy", "clone"):
            return self._convert(self._value(call.args[0]), dtype)
        if name == "amax":
            value = self._value(call.args[0])
            whole = value.space == ELEMENT and self._space(call.results[0]) == BLOCK
            if not whole or dtype != torch.float32:
                raise Unrecordable("amax")
            return self._make(BLOCK, dtype, "{0}", [value], "reduce")
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
        values = table.value.tolist()
        name = f"table_{zlib.crc32(repr(values).encode()):x}"
        self._tables[name] = values
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
        if space == ELEMENT and any(value.space == PAIR for value in needs):
            raise Unrecordable("elements and pairs of them together")
        if name == "addcmul" and any(need.space == SCALAR for need in needs[1:]):
            name = "add_scaled"
        text = OPERATIONS[name](texts, call.kwargs, computed)
        result = torch.bool if dtype == torch.bool else computed
        return self._convert(self._make(space, result, text, needs), dtype)
