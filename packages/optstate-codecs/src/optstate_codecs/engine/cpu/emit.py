"""Lowered records as C: one function for a row, and one that steps all tensors of a bucket.

Loops go over pieces of a row, with one iteration an element and only 32-bit numbers inside, which
compilers turn into vector instructions; narrower numbers are widened before and narrowed after, in
loops of their own. Nothing is allocated: what a row needs lies on the stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from optstate_codecs.engine.cpu.lower import ELEMENT, FINITE, ONE, PAIR, ROW, Lowered, Value
from optstate_codecs.engine.cpu.operations import C_TYPES, PRELUDE, literal

__all__ = ["emit"]

# elements of a piece of a row: what is widened for it stays in the first cache
PIECE = 256
MAGNITUDE = ("__builtin_fabsf({0})",)
STORED = {
    torch.float32: "float",
    torch.bfloat16: "uint16_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
}


def emit(
    fast: Lowered,
    slow: Lowered,
    tensors: Mapping[str, tuple[torch.dtype, int]],
    scalars: Sequence[str],
    draws: Mapping[str, tuple[int, bool]],
    block: int,
) -> str:
    """C for a step.

    Args:
        fast: what a row is stepped by where its assumptions hold.
        slow: what it is stepped by otherwise.
        tensors: the dtype and span of every input that is a tensor, in the order of the table.
        scalars: the inputs that are numbers, in the order of theirs.
        draws: the stream of every input that is 16 random bits an element, and whether pairs of
            steps draw mirrored ones.
        block: elements a row.
    """
    tables = {**fast.tables, **slow.tables}
    source = [PRELUDE, f"enum {{ BLOCK = {block} }};"]
    for name, values in tables.items():
        numbers = ", ".join(literal(value, torch.float32) for value in values)
        source.append(f"static const float {name}[{len(values)}] = {{{numbers}}};")
    given = ", ".join(
        [
            *(f"{STORED[dtype]} *__restrict {name}" for name, (dtype, _) in tensors.items()),
            "const float *scalars, const uint32_t *keys, uint64_t start, int64_t step",
        ]
    )
    for name, lowered in (("fast", fast), ("slow", slow)):
        body = _Row(lowered, tensors, scalars, draws, block).lines()
        source.append(f"static __attribute__((noinline)) int {name}({given}) {{")
        source += ["    " + line for line in body] + ["}"]
    return "\n".join([*source, _run(tensors, len(scalars), len(draws), block)])


class _Row:
    """The body of the function that steps a row."""

    def __init__(
        self,
        lowered: Lowered,
        tensors: Mapping[str, tuple[torch.dtype, int]],
        scalars: Sequence[str],
        draws: Mapping[str, tuple[int, bool]],
        block: int,
    ) -> None:
        self._lowered, self._tensors, self._draws = lowered, tensors, draws
        self._scalars, self._block = list(scalars), block
        self._order: list[Value] = []
        self._names: dict[Value, str] = {}
        self._users: dict[Value, list[int]] = {}
        for value in [*lowered.stores.values(), *lowered.assumptions]:
            self._visit(value)
        # flags of rows are seen before a loop, those of elements after it
        self._checked = max(
            (v.level + (v.space > ROW) for v in lowered.assumptions), default=0
        )
        self._delay()
        self._levels = 1 + max(
            [v.level for v in self._order] + [self._store_level(n) for n in lowered.stores]
        )
        self._kept = {v for v in self._order if v.space > ROW and self._crosses(v)}

    def _visit(self, value: Value) -> None:
        """List ``value`` after what it needs."""
        if value in self._names:
            return
        for need in value.needs:
            self._visit(need)
        self._names[value] = f"v{len(self._names)}"
        self._order.append(value)

    def _delay(self) -> None:
        """Compute what is only needed at a later level there, where no more is kept for it."""
        for value in reversed(self._order):
            level = self._wanted(value)
            if value.space <= ROW or value.kind != "value" or level <= value.level:
                continue
            cone, rim = self._cone(value)
            if sum(not self._crosses(need) for need in rim) <= 1:
                for member in cone:
                    member.level = level

    def _wanted(self, value: Value) -> int:
        """The first level that needs ``value``; its own where that may not change."""
        users = [user for user in self._order if value in user.needs]
        levels = [user.level for user in users if user.space == value.space]
        levels += [self._store_level(n) for n, v in self._lowered.stores.items() if v is value]
        fixed = value in self._lowered.assumptions or any(u.space != value.space for u in users)
        return value.level if fixed or not levels else min(levels)

    def _cone(self, value: Value) -> tuple[list[Value], list[Value]]:
        """What only serves to compute ``value``, that included; and what all of it needs."""
        cone, rim = [value], list(value.needs)
        outside: list[Value] = []
        while rim:
            need = rim.pop()
            if need.space <= ROW or need.kind == "input" or need in cone or need in outside:
                continue
            users = [user for user in self._order if need in user.needs]
            kept = need in self._lowered.assumptions or need in self._lowered.stores.values()
            inner = need.kind == "value" and need.space == value.space and need.level == value.level
            if inner and not kept and all(user in cone for user in users):
                cone.append(need)
                rim += [*need.needs, *outside]
                outside.clear()
            else:
                outside.append(need)
        return cone, outside

    def _store_level(self, name: str) -> int:
        """The level at which an input may be overwritten."""
        value = self._lowered.stores[name]
        reads = [
            user.level
            for user in self._order
            for need in user.needs
            if need.kind == "input" and need.text == name
        ]
        return max([value.level, self._checked, *reads])

    def _crosses(self, value: Value) -> bool:
        """Whether an element's number is needed in another loop than its own."""
        if value.kind == "input":
            return False
        return any(
            (user.level, user.space) != (value.level, value.space)
            and (user.kind != "reduce" or user.level != value.level)
            for user in self._order
            if value in user.needs
        ) or any(
            stored is value and self._store_level(name) > value.level
            for name, stored in self._lowered.stores.items()
        )

    def lines(self) -> list[str]:
        lines = ["int32_t bad = 0;"]
        for value in self._order:
            if value in self._kept:
                length = self._block // (2 if value.space == PAIR else 1)
                c_type = "int32_t" if value.dtype == torch.bool else C_TYPES[value.dtype]
                lines.append(f"{c_type} kept_{self._names[value]}[{length}];")
        for level in range(self._levels):
            lines += self._row_values(level)
            flags = [v for v in self._lowered.assumptions if v.space <= ROW and v.level == level]
            lines += [f"bad |= !{self._names[v]};" for v in flags]
            if level == self._checked:
                lines.append("if (bad) return 0;")
            lines += self._loop(level, PAIR) + self._loop(level, ELEMENT)
        for name, value in self._lowered.stores.items():
            if self._wide(name) == ROW:
                lines.append(f"*{name} = ({STORED[self._tensors[name][0]]}){self._names[value]};")
        return [*lines, "return 1;"]

    def _row_values(self, level: int) -> list[str]:
        lines = []
        for value in self._order:
            if value.space > ROW or value.kind == "reduce" or value.level != level:
                continue
            text = self._input(value) if value.kind == "input" else self._text(value)
            lines.append(f"const {C_TYPES[value.dtype]} {self._names[value]} = {text};")
        return lines

    def _input(self, value: Value) -> str:
        if value.space == ONE:
            return f"scalars[{self._scalars.index(value.text)}]"
        return f"*{value.text}"

    def _text(self, value: Value) -> str:
        return value.text.format(*(self._names[need] for need in value.needs))

    def _loop(self, level: int, space: int) -> list[str]:
        """The loop that computes the numbers of a space and level, and stores what is ready."""
        here = [v for v in self._order if v.space == space and v.level == level and v.kind != "input"]
        reduced = [
            v for v in self._order
            if v.kind == "reduce" and v.level == level and v.needs[0].space == space
        ]
        stores = [
            (name, value) for name, value in self._lowered.stores.items()
            if self._store_level(name) == level and self._wide(name) == space
        ]
        flags = [v for v in dict.fromkeys(self._lowered.assumptions) if v.space == space and v.level == level]
        if not here and not reduced and not stores:
            return []
        return _Loop(self, space, here, reduced, stores, flags).lines()

    def _wide(self, name: str) -> int:
        span = self._tensors[name][1]
        return {1: ELEMENT, 2: PAIR}.get(span, ROW)


class _Loop:
    """One loop over a row, in pieces."""

    def __init__(
        self,
        row: _Row,
        space: int,
        here: list[Value],
        reduced: list[Value],
        stores: list[tuple[str, Value]],
        flags: list[Value],
    ) -> None:
        self._row, self._space = row, space
        self._here, self._reduced, self._stores, self._flags = here, reduced, stores, flags
        self._length = row._block // (2 if space == PAIR else 1)
        self._piece = min(self._length, PIECE)
        self._before: list[str] = []
        self._inside: list[str] = []
        self._after: list[str] = []
        self._loaded: dict[Value, str] = {}
        self._words: set[str] = set()

    def lines(self) -> list[str]:
        names = self._row._names
        lines = [f"int32_t most_{names[v]} = 0;" for v in self._reduced]
        lines_after: list[str] = []
        for value in self._here:
            if value in self._flags and not any(value in v.needs for v in self._row._order):
                continue  # written where it is asked for
            needs = [self._local(need, value.kind) for need in value.needs]
            text = value.text.format(*needs)
            if value.kind == "pair":
                text = f"(j & 1 ? {needs[1]} : {needs[0]})"
            self._inside.append(f"const {C_TYPES[value.dtype]} {names[value]} = {text};")
            if value in self._row._kept:
                self._inside.append(f"kept_{names[value]}[c + j] = {names[value]};")
        for value in self._reduced:
            # bits of floats that are not negative are in order, and NaN is above all
            bits = f"as_int(__builtin_fabsf({self._local(value.needs[0], '')}))"
            most = f"most_{names[value]}"
            self._inside.append(f"{most} = {bits} > {most} ? {bits} : {most};")
        # the largest magnitude tells whether all are finite
        seen = {v.needs[0]: v for v in self._reduced}
        seen |= {v.needs[0].needs[0]: v for v in self._reduced if v.needs[0].text in MAGNITUDE}
        flags = []
        for flag in self._flags:
            if flag.text == FINITE and flag.needs[0] in seen:
                lines_after.append(f"bad |= most_{names[seen[flag.needs[0]]]} >= 0x7f800000;")
            else:
                flags.append(flag.text.format(*(self._local(n, "") for n in flag.needs)))
        if flags:
            self._inside.append(f"bad |= !({' & '.join(flags)});")
        for name, value in self._stores:
            self._store(name, value)
        lines.append(f"for (int c = 0; c < {self._length}; c += {self._piece}) {{")
        lines += ["    " + line for line in self._before]
        lines.append(f"    for (int j = 0; j < {self._piece}; j++) {{")
        lines += ["        " + line for line in self._inside]
        lines += ["    }", *("    " + line for line in self._after), "}"]
        for value in self._reduced:
            lines.append(f"const float {names[value]} = as_float(most_{names[value]});")
        return lines + lines_after

    def _local(self, need: Value, kind: str) -> str:
        """How a number that another one needs is called in this loop."""
        row = self._row
        name = row._names[need]
        if need.space <= ROW or (need in self._here):
            return name
        if need.kind == "input":
            return self._load(need)
        place = {"low": "2 * (c + j)", "high": "2 * (c + j) + 1", "pair": "(c + j) >> 1"}
        text = f"kept_{name}[{place.get(kind, 'c + j')}]"
        return f"({text} != 0)" if need.dtype == torch.bool else text

    def _load(self, value: Value) -> str:
        if value in self._loaded:
            return self._loaded[value]
        name = value.text
        wide = "wide_" + self._row._names[value]
        stored = self._row._tensors[name][0] if name in self._row._tensors else None
        if stored in (torch.float32, torch.int32):
            text = f"{name}[c + j]"
        else:
            self._before.append(f"int32_t {wide}[{self._piece}];")
            if stored is None:
                self._draw(name, wide)
            else:
                self._before.append(
                    f"for (int j = 0; j < {self._piece}; j++) {wide}[j] = {name}[c + j];"
                )
            text = f"{wide}[j]"
        self._loaded[value] = text
        return text

    def _draw(self, name: str, wide: str) -> None:
        """16 random bits an element, out of words of two elements; see ``rounding``."""
        stream, mirrored = self._row._draws[name]
        words = f"words{stream // 2}" + "_mirrored" * mirrored
        if words not in self._words:
            self._words.add(words)
            self._hash(words, list(self._row._draws).index(name), mirrored)
        swap = "x << 16 | x >> 16" if stream % 2 else "x"
        flip = " ^ (step & 1 ? 0xffff : 0)" if mirrored else ""
        half, halves = self._piece // 2, f"halves_{wide}"
        self._before += [
            f"uint32_t turned_{wide}[{half}]; uint16_t {halves}[{self._piece}];",
            f"for (int j = 0; j < {half}; j++) {{",
            f"    const uint32_t x = {words}[j];",
            f"    turned_{wide}[j] = {swap};",
            "}",
            f"memcpy({halves}, turned_{wide}, sizeof {halves});",
            f"for (int j = 0; j < {self._piece}; j++) {wide}[j] = {halves}[j]{flip};",
        ]

    def _hash(self, words: str, place: int, mirrored: bool) -> None:
        """One word for two elements."""
        turn = "(step & ~(int64_t)1)" if mirrored else "step"
        self._before += [
            f"uint32_t {words}[{self._piece // 2}];",
            "{",
            f"    const uint32_t turn = (uint32_t){turn};",
            "    const uint64_t first = (start + c) >> 1;",
            f"    const uint32_t low = (uint32_t)first + mix32(keys[{2 * place}] + turn);",
            f"    const uint32_t high = mix32(keys[{2 * place + 1}] ^ (turn * 0x9e3779b9u))",
            "        + (uint32_t)(first >> 32) * 0x9e3779b9u;",
            f"    for (uint32_t j = 0; j < {self._piece // 2}; j++) {words}[j] = word(low + j, high);",
            "}",
        ]

    def _store(self, name: str, value: Value) -> None:
        stored = self._row._tensors[name][0]
        text = self._local(value, "")
        if stored in (torch.float32, torch.int32):
            self._inside.append(f"{name}[c + j] = {text};")
            return
        self._before.append(f"int32_t new_{name}[{self._piece}];")
        self._inside.append(f"new_{name}[j] = {text};")
        self._after.append(
            f"for (int j = 0; j < {self._piece}; j++) {name}[c + j] = ({STORED[stored]})new_{name}[j];"
        )


def _run(
    tensors: Mapping[str, tuple[torch.dtype, int]], scalars: int, draws: int, block: int
) -> str:
    """The function that steps every tensor of a table.

    A row of the table has the number of elements, the number of the tensor's first row among those
    of all tensors, its step count, and the tensors' addresses.
    """
    names = list(tensors)
    pointers = [
        f"({STORED[dtype]} *)at[{3 + i}] + "
        + ("row" if span > 2 else "first" if span == 1 else "first / 2")
        for i, (dtype, span) in enumerate(tensors.values())
    ]
    width = 3 + len(names)
    lines = [
        "static void one(const int64_t *at, const float *scalars, const uint32_t *keys, int64_t row) {",
        "    const int64_t first = row * BLOCK, left = at[0] - first;",
    ]
    call = ", ".join([*names, "scalars", "keys", "(uint64_t)first", "at[2]"])
    for name, (dtype, _), pointer in zip(names, tensors.values(), pointers, strict=True):
        lines.append(f"    {STORED[dtype]} *{name} = {pointer};")
    lines += [
        "    if (left >= BLOCK) {",
        f"        if (!fast({call})) slow({call});",
        "        return;",
        "    }",
    ]
    copies, back = [], []
    for name, (dtype, span) in tensors.items():
        if span > 2:
            lines.append(f"    {STORED[dtype]} *const end_{name} = {name};")
            continue
        count = "left" if span == 1 else "(left + 1) / 2"
        length = "BLOCK" if span == 1 else "BLOCK / 2"
        lines.append(f"    {STORED[dtype]} end_{name}[{length}] = {{0}};")
        copies.append(f"    memcpy(end_{name}, {name}, sizeof *{name} * ({count}));")
        if name != "grad":
            back.append(f"    memcpy({name}, end_{name}, sizeof *{name} * ({count}));")
    end = ", ".join([*(f"end_{n}" for n in names), "scalars", "keys", "(uint64_t)first", "at[2]"])
    lines += [*copies, f"    if (!fast({end})) slow({end});", *back, "}"]
    return "\n".join(lines) + f"""

#ifdef __cplusplus
extern "C"
#endif
void run(int64_t units, int64_t rows, const int64_t *table, const float *scalars,
         const uint32_t *keys, int threads) {{
    #pragma omp parallel for schedule(static) num_threads(threads) if (rows * BLOCK > 32768)
    for (int part = 0; part < threads; part++) {{
        int64_t unit = 0;
        const int64_t stop = rows * (part + 1) / threads;
        for (int64_t row = rows * part / threads; row < stop; row++) {{
            while (unit + 1 < units && table[(unit + 1) * {width} + 1] <= row) unit++;
            const int64_t *at = table + unit * {width};
            one(at, scalars + unit * {max(scalars, 1)}, keys + unit * {max(2 * draws, 1)}, row - at[1]);
        }}
    }}
}}
"""
