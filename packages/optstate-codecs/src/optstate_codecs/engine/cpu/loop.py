"""Generates the C++ loops over the elements, groups or rows of a block.

The outer loop of elements or groups is over *strips*, which lie in one row each. The inner one is
over a strip's vectors. Random bits are drawn before it, for a whole strip.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from optstate_codecs.engine.cpu.operations import C_TYPES, VECTORS
from optstate_codecs.engine.cpu.peephole import FINITE, SQUARE_IN_RANGE
from optstate_codecs.engine.cpu.value import SCALAR, Value, is_row

__all__ = ["KernelInputs", "Loop", "Names", "row_loop"]

# elements a strip
STRIP = 256
NARROW = {torch.uint8: "char(0)", torch.int8: "char(0)"}
NARROW |= dict.fromkeys((torch.int16, torch.bfloat16), "short(0)")


@dataclass(frozen=True)
class KernelInputs:
    """The inputs of a compiled kernel, in the order of its tables.

    Attributes:
        tensors: name, dtype and entries for each element of each tensor.
        scalars: names of the float32 scalars.
        draws: name, stream and whether mirrored (``Draw.paired16``) of each input that is 16
            random bits an element.
        counts: name and row length of each input that is the number of a row's elements.
        block_size: elements a block.
        masked: whether the elements that fill up a short block are not zero and must not be part
            of the largest magnitudes.
    """

    tensors: Mapping[str, tuple[torch.dtype, Fraction]]
    scalars: Sequence[str]
    draws: Mapping[str, tuple[int, bool]]
    counts: Mapping[str, int]
    block_size: int
    masked: bool

    def entries(self, space: Fraction) -> int:
        """Entries of a space in a block."""
        return int(space * self.block_size)


class Names:
    """The C++ names of values.

    Attributes:
        kept: values kept in arrays of a block, since other loops than their own need them.
        users: of each value.
    """

    def __init__(
        self,
        names: Mapping[Value, str],
        kept: Collection[Value],
        users: Mapping[Value, list[Value]],
    ) -> None:
        self._names = names
        self.kept = [value for value in names if value in kept]
        self.users = users

    def __getitem__(self, value: Value) -> str:
        return self._names[value]


def row_loop(
    names: Names, inputs: KernelInputs, values: Sequence[Value], flags: Sequence[Value]
) -> list[str]:
    """The loop over the rows of a block that computes ``values`` and checks ``flags``."""

    def operand(need: Value) -> str:
        return names[need] if need.space == SCALAR else f"{names[need]}[r]"

    lines = []
    for value in values:
        text = value.text.format(*map(operand, value.needs))
        if value.kind == "input" and value.text in inputs.counts:
            text = f"row_length({inputs.counts[value.text]}, r, left)"
        elif value.kind == "input":
            text = f"{value.text}[r]"
        lines.append(f"{names[value]}[r] = {text};")
    lines += [f"bad |= !{names[flag]}[r];" for flag in flags]
    rows = inputs.entries(next(iter([*values, *flags])).space)
    return [f"for (int r = 0; r < {rows}; r++) {{", *(f"    {line}" for line in lines), "}"]


class Loop:
    """Collects the lines of a loop over elements or groups.

    Args:
        names: of all values.
        inputs: of the kernel.
        space: of the values.
        values: computed in the loop, in order.
        largest: the largest magnitudes of rows that the loop finds.
        joins: values of neighbours that the loop stores.
        stores: values to write, by the name of the input.
        flags: assumptions on every element.
        ahead: inputs to fetch into the cache, and how many entries after the loop's place.
    """

    def __init__(
        self,
        names: Names,
        inputs: KernelInputs,
        space: Fraction,
        *,
        values: Sequence[Value],
        largest: Sequence[Value],
        joins: Sequence[Value],
        stores: Mapping[str, Value],
        flags: Sequence[Value],
        ahead: Mapping[str, int],
    ) -> None:
        self._names, self._inputs, self._space, self._ahead = names, inputs, space, ahead
        self._values, self._largest, self._stores = values, largest, stores
        self._joins, self._flags = joins, flags
        self._shared: dict[Value, str] = {}
        self._before: list[str] = []
        self._inside: list[str] = []
        self._after: list[str] = []
        self._loaded: dict[Value, str] = {}
        self._split: dict[tuple[Value, int], str] = {}
        self._words: set[str] = set()

    def lines(self) -> list[str]:
        """The loop in C++; empty where it has nothing to compute, reduce or store."""
        if not (self._values or self._largest or self._joins or self._stores):
            return []
        for value in self._values:
            self._compute(value)
        for value in self._largest:
            # the bits of non-negative floats are ordered as they are, with NaN above all
            most = f"most_{self._names[value]}"
            bits = f"as_int(magnitude({self._local(value.needs[0])}))"
            if self._inputs.masked:
                bits = f"select_i(ld(counting) < I((int32_t)left - j), {bits}, 0)"
            self._before.append(f"I {most} = 0;")
            self._inside.append(f"{most} = most_int({most}, {bits});")
            kept = f"{self._names[value]}_bits[{self._row(value.space)}]"
            self._after.append(f"{kept} = most_int({kept}, largest({most}));")
        for value in self._joins:
            self._join(value)
        end = self._check()
        for name, value in self._stores.items():
            self._store(name, self._inputs.tensors[name][0], self._local(value))
        strip, length = self._strip(), self._inputs.entries(self._space)
        if self._words:
            self._before.insert(0, f"const int WORDS = {strip // 2};")
        used = f"c * {self._space.denominator} < left * {self._space.numerator}"
        inner = [
            f"for (int j = c; j < c + {strip}; j += LANES) {{",
            *("    " + line for line in self._inside),
            "}",
        ]
        return [
            f"for (int c = 0; c < {length} && {used}; c += {strip}) {{",
            *(
                "    " + line
                for line in [*self._prefetch(strip), *self._before, *inner, *self._after]
            ),
            "}",
            *end,
        ]

    def _prefetch(self, strip: int) -> list[str]:
        """Fetch what the next loops of this block, and the first ones of the next block, read."""
        lines = []
        for name, ahead in self._ahead.items():
            dtype, space = self._inputs.tensors[name]
            entries = int(strip / self._space * space)
            place = f"{name} + c / {strip} * {entries} + {ahead}"
            lines.append(f"prefetch({place}, {entries * dtype.itemsize});")
        return lines

    def _strip(self) -> int:
        """Entries a strip: it lies in one row of every kind."""
        rows = {value.space for value in [*self._shared, *self._largest]} - {SCALAR}
        lengths = [int(self._space / row) for row in rows]
        whole = self._inputs.entries(self._space)
        return min([whole, STRIP if whole % STRIP == 0 else whole, *lengths])

    def _row(self, space: Fraction) -> str:
        """The index of the strip's row."""
        return f"c / {int(self._space / space)}"

    def _compute(self, value: Value) -> None:
        name = self._names[value]
        if value in self._flags and not self._names.users[value]:
            return  # ``_check`` writes it
        vector = VECTORS[C_TYPES[value.dtype]]
        self._inside.append(f"const {vector} {name} = {self._text(value)};")
        if value in self._names.kept:
            if value.dtype == torch.bool:
                name = f"select_i({name}, 1, 0)"
            self._inside.append(f"st(kept_{self._names[value]} + j, {name});")

    def _text(self, value: Value) -> str:
        if value.kind != "lane":
            return value.text.format(*map(self._local, value.needs))
        (need,), lanes = value.needs, value.lanes
        if (need, lanes) not in self._split:
            name = self._split[need, lanes] = f"lanes{lanes}_{self._names[need]}"
            source = need.text if need.kind == "input" else f"kept_{self._names[need]}"
            self._inside += [
                f"I {name}[{lanes}];",
                f"ld_lanes<{lanes}>({source} + j * {lanes}, {name});",
            ]
        return f"{self._split[need, lanes]}[{value.lane}]"

    def _join(self, value: Value) -> None:
        """Store the lanes of ``value``, which are values of this loop, as neighbours."""
        lanes, name = len(value.needs), self._names[value]
        needs = ", ".join(map(self._local, value.needs))
        self._inside += [
            f"const I join_{name}[{lanes}] = {{{needs}}};",
            f"st_lanes<{lanes}>(kept_{name} + j * {lanes}, join_{name});",
        ]

    def _check(self) -> list[str]:
        """Check the flags in the loop, or after it in the lines returned."""
        # where the loop finds the largest magnitude, that tells whether all are finite
        seen = {value.needs[0]: value for value in self._largest}
        for value in self._largest:
            if value.needs[0].text == "magnitude({0})":
                seen[value.needs[0].needs[0]] = value
        texts, end = [], []
        for flag in self._flags:
            if flag.text == SQUARE_IN_RANGE:
                self._check_range(self._names[flag], self._local(flag.needs[0]))
            elif flag.text == FINITE and flag.needs[0] in seen:
                value = seen[flag.needs[0]]
                rows = self._inputs.entries(value.space)
                bits = f"{self._names[value]}_bits[r]"
                end.append(f"for (int r = 0; r < {rows}; r++) bad |= {bits} >= 0x7f800000;")
            else:
                texts.append(flag.text.format(*map(self._local, flag.needs)))
        if texts:
            self._before.append("M wrong = none();")
            self._inside.append(f"wrong = wrong | !({' & '.join(texts)});")
            self._after.append("bad |= any(wrong);")
        return end

    def _check_range(self, name: str, magnitude: str) -> None:
        """Check that all magnitudes are 0 or from 2^-63 to 2^63, by their bits."""
        self._before.append(f"I top_{name} = 0, end_{name} = 0x7fffffff;")
        self._inside += [
            f"top_{name} = most_int(top_{name}, as_int({magnitude}));",
            # the bits of 0, minus 1, are the largest unsigned integer
            f"end_{name} = least_unsigned(end_{name}, as_int({magnitude}) - 1);",
        ]
        self._after.append(
            f"bad |= largest(top_{name}) > 0x5f000000 || any(end_{name} < 0x1fffffff);"
        )

    def _local(self, need: Value) -> str:
        """The C++ expression for an operand in this loop."""
        name = self._names[need]
        if is_row(need.space):
            return self._share(need)
        if need in self._values:
            return name
        if need.kind == "input":
            return self._load(need)
        text = f"ld(kept_{name} + j)"
        return f"({text} != 0)" if need.dtype == torch.bool else text

    def _share(self, need: Value) -> str:
        """A value of the row, as a vector of equal numbers."""
        if need not in self._shared:
            name = self._shared[need] = f"all_{self._names[need]}"
            source = self._names[need]
            if need.space != SCALAR:
                source += f"[{self._row(need.space)}]"
            kind = VECTORS[C_TYPES[need.dtype]]
            if kind == "M":
                self._before.append(f"const M {name} = I({source}) != 0;")
            else:
                self._before.append(f"const {kind} {name} = {kind}({source});")
        return self._shared[need]

    def _load(self, value: Value) -> str:
        if value not in self._loaded:
            name = value.text
            if name in self._inputs.draws:
                text = self._draw(name, f"bits_{self._names[value]}")
            else:
                text = f"ld({name} + j)"
            local = self._loaded[value] = f"in_{self._names[value]}"
            self._inside.append(f"const {VECTORS[C_TYPES[value.dtype]]} {local} = {text};")
        return self._loaded[value]

    def _draw(self, name: str, halves: str) -> str:
        """Draw 16 random bits an element, from words of two elements; see ``rounding``."""
        stream, mirrored = self._inputs.draws[name]
        words = f"words{stream // 2}" + "_mirrored" * mirrored
        if words not in self._words:
            self._words.add(words)
            self._hash(words, list(self._inputs.draws).index(name), mirrored)
        if stream % 2 and f"turned_{words}" not in self._words:
            self._words.add(f"turned_{words}")
            turn = f"shl(ld({words} + k), 16) | shr(ld({words} + k), 16)"
            self._before += [
                f"int32_t turned_{words}[{STRIP // 2}];",
                f"for (int k = 0; k < WORDS; k += LANES) st(turned_{words} + k, {turn});",
            ]
        if stream % 2:
            words = f"turned_{words}"
        if mirrored:
            self._before.append(f"const I flip_{halves} = I(step & 1 ? 0xffff : 0);")
        return f"(ld((const uint16_t *){words} + (j - c))" + (
            f" ^ flip_{halves})" if mirrored else ")"
        )

    def _hash(self, words: str, draw: int, mirrored: bool) -> None:
        """Compute one hash word for every two elements."""
        odd = "0" if mirrored else "step & 1"
        self._before += [
            f"int32_t {words}[{STRIP // 2}];",
            "{",
            "    const uint32_t turn = (uint32_t)step & ~1u;",
            f"    const I factor = I((int32_t)(0x846ca68bu * ({odd} ? 747796405u : 1u)));",
            "    const uint64_t first = (start + c) >> 1;",
            f"    const uint32_t low = (uint32_t)first + mix32(keys[{2 * draw}] + turn);",
            f"    const uint32_t top = mix32(keys[{2 * draw + 1}] ^ (turn * 0x9e3779b9u))",
            "        + (uint32_t)(first >> 32) * 0x9e3779b9u;",
            "    const I high = I((int32_t)top);",
            "    for (int k = 0; k < WORDS; k += LANES)",
            f"        st({words} + k, word(I((int32_t)(low + k)) + ld(counting), high, factor));",
            "}",
        ]

    def _store(self, name: str, dtype: torch.dtype, text: str) -> None:
        narrow = f", {NARROW[dtype]}" if dtype in NARROW else ""
        self._inside.append(f"st({name} + j, {text}{narrow});")
