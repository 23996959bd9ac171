"""Generates one C loop over the elements, or pairs, of a block.

The loop is strip-mined: the outer loop is over strips of the block, the inner one over a strip's
elements. The inner loop contains only 32-bit values, so that compilers vectorise it. Separate loops
draw a strip's random bits, widen narrower inputs before it and narrow results after it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from optstate_codecs.engine.cpu.operations import C_TYPES, STORED
from optstate_codecs.engine.cpu.peephole import FINITE
from optstate_codecs.engine.cpu.value import BLOCK, Value

__all__ = ["Loop", "Names"]

# elements a strip, whose widened inputs stay in the first-level cache
STRIP = 256
WIDE = (torch.float32, torch.int32)
OFFSETS = {"low": "2 * (c + j)", "high": "2 * (c + j) + 1", "pair": "(c + j) >> 1"}


class Names:
    """The C names of values.

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


class Loop:
    """Collects the lines of a loop.

    Args:
        names: of all values.
        tensors: the dtype and span of inputs that are tensors.
        draws: stream, and whether mirrored, of inputs that are random bits.
        length: iterations.
        values: computed in the loop, in order.
        reduced: reductions over the loop, which give the largest magnitude of a block.
        stores: values to write, by the name of the input.
        flags: assumptions on every element.
    """

    def __init__(
        self,
        names: Names,
        tensors: Mapping[str, tuple[torch.dtype, int]],
        draws: Mapping[str, tuple[int, bool]],
        *,
        length: int,
        values: Sequence[Value],
        reduced: Sequence[Value],
        stores: Mapping[str, Value],
        flags: Sequence[Value],
    ) -> None:
        self._names, self._tensors, self._draws = names, tensors, draws
        self._length, self._strip = length, min(length, STRIP)
        self._values, self._reduced, self._stores = values, reduced, stores
        self._flags = flags
        self._before: list[str] = []
        self._inside: list[str] = []
        self._after: list[str] = []
        self._loaded: dict[Value, str] = {}
        self._words: set[str] = set()

    def lines(self) -> list[str]:
        """The loop in C; empty where it has nothing to compute, reduce or store."""
        if not self._values and not self._reduced and not self._stores:
            return []
        for value in self._values:
            self._compute(value)
        for value in self._reduced:
            # the bits of non-negative floats are ordered as they are, with NaN above all
            bits = f"as_int(__builtin_fabsf({self._local(value.needs[0])}))"
            most = f"most_{self._names[value]}"
            self._inside.append(f"{most} = {bits} > {most} ? {bits} : {most};")
        end = self._check()
        for name, value in self._stores.items():
            self._store(name, value)
        found = [self._names[value] for value in self._reduced]
        return [
            *(f"int32_t most_{name} = 0;" for name in found),
            f"for (int c = 0; c < {self._length}; c += {self._strip}) {{",
            *("    " + line for line in self._before),
            f"    for (int j = 0; j < {self._strip}; j++) {{",
            *("        " + line for line in self._inside),
            "    }",
            *("    " + line for line in self._after),
            "}",
            *(f"const float {name} = as_float(most_{name});" for name in found),
            *end,
        ]

    def _compute(self, value: Value) -> None:
        name = self._names[value]
        if value in self._flags and not self._names.users[value]:
            return  # ``_check`` writes it
        needs = [self._local(need, value.kind) for need in value.needs]
        text = value.text.format(*needs)
        if value.kind == "pair":
            text = f"(j & 1 ? {needs[1]} : {needs[0]})"
        self._inside.append(f"const {C_TYPES[value.dtype]} {name} = {text};")
        if value in self._names.kept:
            self._inside.append(f"kept_{name}[c + j] = {name};")

    def _check(self) -> list[str]:
        """Check the flags in the loop, or after it in the lines returned."""
        # where the loop finds the largest magnitude, that tells whether all are finite
        seen = {value.needs[0]: value for value in self._reduced}
        for value in self._reduced:
            if value.needs[0].text == "__builtin_fabsf({0})":
                seen[value.needs[0].needs[0]] = value
        texts, end = [], []
        for flag in self._flags:
            if flag.text == FINITE and flag.needs[0] in seen:
                most = self._names[seen[flag.needs[0]]]
                end.append(f"bad |= most_{most} >= 0x7f800000;")
            else:
                texts.append(flag.text.format(*(self._local(need) for need in flag.needs)))
        if texts:
            self._inside.append(f"bad |= !({' & '.join(texts)});")
        return end

    def _local(self, need: Value, kind: str = "") -> str:
        """The C expression for an operand in this loop; ``kind`` is its user's."""
        name = self._names[need]
        if need.space <= BLOCK or need in self._values:
            return name
        if need.kind == "input":
            return self._load(need)
        text = f"kept_{name}[{OFFSETS.get(kind, 'c + j')}]"
        return f"({text} != 0)" if need.dtype == torch.bool else text

    def _load(self, value: Value) -> str:
        if value not in self._loaded:
            self._loaded[value] = self._read(value)
        return self._loaded[value]

    def _read(self, value: Value) -> str:
        """The C expression for an input in this loop; a narrow one is widened first."""
        name, wide = value.text, f"wide_{self._names[value]}"
        if name in self._draws:
            self._draw(name, wide)
        elif self._tensors[name][0] in WIDE:
            return f"{name}[c + j]"
        else:
            self._strip_loop(self._before, f"{wide}[j] = {name}[c + j]")
            self._before.insert(len(self._before) - 1, f"int32_t {wide}[{self._strip}];")
        return f"{wide}[j]"

    def _strip_loop(self, lines: list[str], statement: str) -> None:
        lines.append(f"for (int j = 0; j < {self._strip}; j++) {statement};")

    def _draw(self, name: str, wide: str) -> None:
        """Draw 16 random bits an element, from words of two elements; see ``rounding``."""
        stream, mirrored = self._draws[name]
        words = f"words{stream // 2}" + "_mirrored" * mirrored
        if words not in self._words:
            self._words.add(words)
            self._hash(words, list(self._draws).index(name), mirrored)
        half, halves = self._strip // 2, f"halves_{wide}"
        turned = f"({words}[j] << 16 | {words}[j] >> 16)" if stream % 2 else f"{words}[j]"
        flip = " ^ (step & 1 ? 0xffff : 0)" if mirrored else ""
        self._before += [
            f"int32_t {wide}[{self._strip}];",
            f"uint32_t turned_{wide}[{half}];",
            f"uint16_t {halves}[{self._strip}];",
            f"for (int j = 0; j < {half}; j++) turned_{wide}[j] = {turned};",
            f"memcpy({halves}, turned_{wide}, sizeof {halves});",
        ]
        self._strip_loop(self._before, f"{wide}[j] = {halves}[j]{flip}")

    def _hash(self, words: str, draw: int, mirrored: bool) -> None:
        """Compute one hash word for every two elements."""
        half = self._strip // 2
        odd = "0" if mirrored else "step & 1"
        self._before += [
            f"uint32_t {words}[{half}];",
            "{",
            "    const uint32_t turn = (uint32_t)step & ~1u;",
            f"    const uint32_t factor = 0x846ca68bu * ({odd} ? 747796405u : 1u);",
            "    const uint64_t first = (start + c) >> 1;",
            f"    const uint32_t low = (uint32_t)first + mix32(keys[{2 * draw}] + turn);",
            f"    const uint32_t high = mix32(keys[{2 * draw + 1}] ^ (turn * 0x9e3779b9u))",
            "        + (uint32_t)(first >> 32) * 0x9e3779b9u;",
            f"    for (uint32_t j = 0; j < {half}; j++) {words}[j] = word(low + j, high, factor);",
            "}",
        ]

    def _store(self, name: str, value: Value) -> None:
        dtype = self._tensors[name][0]
        text = self._local(value)
        if dtype in WIDE:
            self._inside.append(f"{name}[c + j] = {text};")
            return
        self._before.append(f"int32_t new_{name}[{self._strip}];")
        self._inside.append(f"new_{name}[j] = {text};")
        self._strip_loop(self._after, f"{name}[c + j] = ({STORED[dtype]})new_{name}[j]")
