"""Schedules the values of a block: fuses them into loops and chooses the arrays in between."""

from __future__ import annotations

from fractions import Fraction

import torch

from optstate_codecs.engine.cpu.loop import KernelInputs, Loop, Names, row_loop
from optstate_codecs.engine.cpu.operations import C_TYPES, STORED
from optstate_codecs.engine.cpu.value import ELEMENT, SCALAR, Lowered, Value, is_row

__all__ = ["block_lines"]


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
        # a level's flags of rows are checked before its loops, those of elements after them
        flags = lowered.assumptions
        self._checked = max((flag.level + (not is_row(flag.space)) for flag in flags), default=0)
        self._delay()
        names = {value: f"v{number}" for number, value in enumerate(self._order)}
        kept = {v for v in self._order if not is_row(v.space) and self._crosses(v)}
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
            if is_row(value.space) or value.kind != "value" or level <= value.level:
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
            if is_row(need.space) or need.kind == "input" or need in cone or need in outside:
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
        return (
            value.kind == "join"
            or any(self._is_elsewhere(value, user) for user in self._users[value])
            or any(
                stored is value and self._store_level(name) > value.level
                for name, stored in self._lowered.stores.items()
            )
        )

    @staticmethod
    def _is_elsewhere(value: Value, user: Value) -> bool:
        if user.kind == "largest":
            return user.level != value.level
        if user.kind == "join":
            return user.level - 1 != value.level
        return user.kind in ("sum", "root") or (user.level, user.space) != (
            value.level,
            value.space,
        )

    def lines(self) -> list[str]:
        """The body of the function."""
        stores = self._lowered.stores
        lines = ["int32_t bad = 0;", *self._declarations(), *self._scalars()]
        last = max([v.level for v in self._order] + [self._store_level(name) for name in stores])
        spaces = sorted({value.space for value in self._order} - {SCALAR})
        spaces += [s for s in self._stored_spaces() if s not in spaces]
        for level in range(last + 1):
            for space in filter(is_row, spaces):
                lines += self._rows(level, space)
            if level == self._checked:
                lines.append("if (bad) return 0;")
            for space in spaces:
                if not is_row(space):
                    lines += self._loop(level, space)
            lines += self._reductions(level)
        for name, value in stores.items():
            space = self._inputs.tensors[name][1]
            if is_row(space):
                rows, stored = self._inputs.entries(space), STORED[self._inputs.tensors[name][0]]
                text = self._names[value] + "[r]" * (value.space != SCALAR)
                lines.append(f"for (int r = 0; r < {rows}; r++) {name}[r] = ({stored}){text};")
        return [*lines, "return 1;"]

    def _stored_spaces(self) -> list[Fraction]:
        return [self._inputs.tensors[name][1] for name in self._lowered.stores]

    def _declarations(self) -> list[str]:
        """The arrays between loops, and those of rows."""
        lines = []
        for value in self._names.kept:
            c_type = "int32_t" if value.dtype == torch.bool else C_TYPES[value.dtype]
            length = self._inputs.entries(value.space)
            lines.append(f"ALIGNED {c_type} kept_{self._names[value]}[{length}];")
        for value in self._order:
            if is_row(value.space) and value.space != SCALAR:
                rows, name = self._inputs.entries(value.space), self._names[value]
                lines.append(f"{C_TYPES[value.dtype]} {name}[{rows}];")
                if value.kind == "largest":
                    lines.append(f"int32_t {name}_bits[{rows}] = {{0}};")
        return lines

    def _scalars(self) -> list[str]:
        """Values that are the same for the whole tensor."""
        lines = []
        for value in self._order:
            if value.space != SCALAR:
                continue
            name, c_type = self._names[value], C_TYPES[value.dtype]
            text = value.text.format(*(self._names[need] for need in value.needs))
            if value.kind == "input":
                text = f"scalars[{list(self._inputs.scalars).index(value.text)}]"
            elif not value.needs and value.dtype == torch.float32:
                lines.append(f"CONSTANT({name}, {text});")
                continue
            lines.append(f"const {c_type} {name} = {text};")
        lines += [
            f"bad |= !{self._names[f]};" for f in self._lowered.assumptions if f.space == SCALAR
        ]
        return lines

    def _rows(self, level: int, space: Fraction) -> list[str]:
        mine = [v for v in self._order if (v.space, v.level) == (space, level) and not v.is_late]
        flags = [v for v in mine if v in self._lowered.assumptions]
        return row_loop(self._names, self._inputs, mine, flags) if mine else []

    def _reductions(self, level: int) -> list[str]:
        """Numbers of rows, and roots, after the loops of their level."""
        lines = []
        for value in self._order:
            if not value.is_late or value.level != level:
                continue
            name, rows = self._names[value], self._inputs.entries(value.space)
            if value.kind == "root":
                arrays = f"kept_{self._names[value.needs[0]]}, kept_{name}"
                lines.append(f"roots((int)(left < BLOCK ? left : BLOCK), {arrays});")
                continue
            text = f"as_float({name}_bits[r])"
            if value.kind == "sum":
                size, source = int(1 / value.space), self._names[value.needs[0]]
                text = f"row_sum<{size}>(kept_{source} + r * {size})"
            lines.append(f"for (int r = 0; r < {rows}; r++) {name}[r] = {text};")
        return lines

    def _ahead(self, level: int) -> dict[str, int]:
        """What the loop over elements of a level fetches: see ``Loop``.

        A processor notices what one loop reads, but not that others follow.
        """
        levels = sorted({v.level for v in self._order if v.space == ELEMENT and v.kind != "input"})
        first = {
            value.text: min(user.level for user in self._users[value])
            for value in self._order
            if value.kind == "input" and value.text in self._inputs.tensors
        }
        if len(levels) < 2 or level not in (levels[0], levels[-1]):
            return {}
        wanted = {
            name: at for name, at in first.items() if not is_row(self._inputs.tensors[name][1])
        }
        if level == levels[0]:
            return {name: 0 for name, at in wanted.items() if at > level}
        return {
            name: self._inputs.entries(self._inputs.tensors[name][1])
            for name, at in wanted.items()
            if at < level
        }

    def _loop(self, level: int, space: Fraction) -> list[str]:
        """The loop that computes the values of a space and level, and stores the final ones."""
        mine = [v for v in self._order if (v.space, v.level) == (space, level)]
        loop = Loop(
            self._names,
            self._inputs,
            space,
            values=[v for v in mine if v.kind not in ("input", "join", "root")],
            largest=[
                v
                for v in self._order
                if v.kind == "largest" and (v.level, v.needs[0].space) == (level, space)
            ],
            joins=[
                v
                for v in self._order
                if v.kind == "join" and (v.level - 1, v.needs[0].space) == (level, space)
            ],
            stores={
                name: value
                for name, value in self._lowered.stores.items()
                if (self._inputs.tensors[name][1], self._store_level(name)) == (space, level)
            },
            flags=[v for v in mine if v in self._lowered.assumptions],
            ahead=self._ahead(level) if space == ELEMENT else {},
        )
        return loop.lines()
