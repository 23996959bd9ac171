"""Schedules the values of a block: fuses them into loops and chooses the arrays in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from optstate_codecs.engine.cpu.loop import Loop, Names
from optstate_codecs.engine.cpu.operations import C_TYPES, STORED
from optstate_codecs.engine.cpu.value import BLOCK, ELEMENT, PAIR, SCALAR, Lowered, Value

__all__ = ["KernelInputs", "block_lines"]


@dataclass(frozen=True)
class KernelInputs:
    """The inputs of a compiled kernel, in the order of its tables.

    Attributes:
        tensors: name, dtype and span of each tensor.
        scalars: names of the float32 scalars.
        draws: name, stream and whether mirrored (``Draw.paired16``) of each input that is 16
            random bits an element.
        block_size: elements a block.
    """

    tensors: Mapping[str, tuple[torch.dtype, int]]
    scalars: Sequence[str]
    draws: Mapping[str, tuple[int, bool]]
    block_size: int

    def space(self, name: str) -> int:
        """Whether a tensor has an entry for each element, pair or block."""
        return {1: ELEMENT, 2: PAIR}.get(self.tensors[name][1], BLOCK)


def block_lines(lowered: Lowered, inputs: KernelInputs) -> list[str]:
    """The body of the C function that steps one block.

    The function returns 1; or 0, before it stores anything, where an assumption does not hold.
    """
    return _Schedule(lowered, inputs).lines()


class _Schedule:
    def __init__(self, lowered: Lowered, inputs: KernelInputs) -> None:
        self._lowered, self._inputs = lowered, inputs
        self._order: list[Value] = []
        self._users: dict[Value, list[Value]] = {}
        for value in [*lowered.stores.values(), *lowered.assumptions]:
            self._visit(value)
        # a level's flags of blocks are checked before its loop, those of elements after it
        flags = lowered.assumptions
        self._checked = max((flag.level + (flag.space > BLOCK) for flag in flags), default=0)
        self._delay()
        names = {value: f"v{number}" for number, value in enumerate(self._order)}
        kept = {v for v in self._order if v.space > BLOCK and self._crosses(v)}
        self._names = Names(names, kept, self._users)

    def _visit(self, value: Value) -> None:
        """Append ``value`` to the order, after its operands."""
        if value in self._users:
            return
        for need in value.needs:
            self._visit(need)
        self._users[value] = []
        for need in dict.fromkeys(value.needs):
            self._users[need].append(value)
        self._order.append(value)

    def _delay(self) -> None:
        """Move values to the later level that needs them, where that takes no more arrays."""
        for value in reversed(self._order):
            level = self._wanted(value)
            if value.space <= BLOCK or value.kind != "value" or level <= value.level:
                continue
            cone, operands = self._cone(value)
            if sum(not self._crosses(need) for need in operands) <= 1:
                for member in cone:
                    member.level = level

    def _wanted(self, value: Value) -> int:
        """The first level that needs ``value``; its own where that may not change."""
        users = self._users[value]
        levels = [user.level for user in users]
        levels += [self._store_level(n) for n, v in self._lowered.stores.items() if v is value]
        fixed = value in self._lowered.assumptions or any(u.space != value.space for u in users)
        return value.level if fixed or not levels else min(levels)

    def _cone(self, value: Value) -> tuple[list[Value], list[Value]]:
        """``value`` and those that only serve to compute it; and the operands of all these."""
        cone, rim = [value], list(value.needs)
        outside: list[Value] = []
        stored = self._lowered.stores.values()
        while rim:
            need = rim.pop()
            if need.space <= BLOCK or need.kind == "input" or need in cone or need in outside:
                continue
            wanted = need in self._lowered.assumptions or need in stored
            inner = (need.kind, need.space, need.level) == ("value", value.space, value.level)
            if inner and not wanted and all(user in cone for user in self._users[need]):
                cone.append(need)
                rim += [*need.needs, *outside]
                outside.clear()
            else:
                outside.append(need)
        return cone, outside

    def _store_level(self, name: str) -> int:
        """The level at which an input may be overwritten: all its reads and all checks are done."""
        reads = [
            user.level
            for value in self._order
            if value.kind == "input" and value.text == name
            for user in self._users[value]
        ]
        return max([self._lowered.stores[name].level, self._checked, *reads])

    def _crosses(self, value: Value) -> bool:
        """Whether another loop than its own needs a value."""
        if value.kind == "input":
            return False
        here = (value.level, value.space)
        return any(
            (user.level, user.space) != here and (user.kind, user.level) != ("reduce", value.level)
            for user in self._users[value]
        ) or any(
            stored is value and self._store_level(name) > value.level
            for name, stored in self._lowered.stores.items()
        )

    def lines(self) -> list[str]:
        """The body of the function."""
        lines = ["int32_t bad = 0;"]
        for value in self._names.kept:
            length = self._inputs.block_size // (2 if value.space == PAIR else 1)
            c_type = "int32_t" if value.dtype == torch.bool else C_TYPES[value.dtype]
            lines.append(f"{c_type} kept_{self._names[value]}[{length}];")
        stores = self._lowered.stores
        last = max([v.level for v in self._order] + [self._store_level(name) for name in stores])
        for level in range(last + 1):
            lines += self._block_values(level)
            flags = [
                v for v in self._lowered.assumptions if (v.space > BLOCK, v.level) == (0, level)
            ]
            lines += [f"bad |= !{self._names[flag]};" for flag in flags]
            if level == self._checked:
                lines.append("if (bad) return 0;")
            lines += self._loop(level, PAIR) + self._loop(level, ELEMENT)
        for name, value in stores.items():
            if self._inputs.space(name) == BLOCK:
                stored = STORED[self._inputs.tensors[name][0]]
                lines.append(f"*{name} = ({stored}){self._names[value]};")
        return [*lines, "return 1;"]

    def _block_values(self, level: int) -> list[str]:
        """Values that are the same for all elements of the block."""
        lines = []
        for value in self._order:
            if value.space > BLOCK or value.kind == "reduce" or value.level != level:
                continue
            name = self._names[value]
            if value.kind == "input":
                scalar = value.space == SCALAR
                text = f"*{value.text}"
                if scalar:
                    text = f"scalars[{list(self._inputs.scalars).index(value.text)}]"
            else:
                text = value.text.format(*(self._names[need] for need in value.needs))
            if value.kind == "value" and not value.needs and value.dtype == torch.float32:
                # volatile: compilers that see a constant turn minima into branches
                lines.append(f"static volatile float fixed_{name} = {text};")
                text = f"fixed_{name}"
            lines.append(f"const {C_TYPES[value.dtype]} {name} = {text};")
        return lines

    def _loop(self, level: int, space: int) -> list[str]:
        """The loop that computes the values of a space and level, and stores the final ones."""
        mine = [v for v in self._order if (v.space, v.level) == (space, level)]
        loop = Loop(
            self._names,
            self._inputs.tensors,
            self._inputs.draws,
            length=self._inputs.block_size // (2 if space == PAIR else 1),
            values=[v for v in mine if v.kind != "input"],
            reduced=[
                v
                for v in self._order
                if (v.kind, v.level, v.needs[0].space if v.needs else -1)
                == ("reduce", level, space)
            ],
            stores={
                name: value
                for name, value in self._lowered.stores.items()
                if (self._inputs.space(name), self._store_level(name)) == (space, level)
            },
            flags=[v for v in mine if v in self._lowered.assumptions],
        )
        return loop.lines()
