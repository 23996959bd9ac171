"""One loop over the elements of a row.

It goes over pieces of the row, with one iteration an element and only 32-bit numbers inside, which
compilers turn into vector instructions. Narrower numbers are widened before and narrowed after, and
random ones drawn before, in loops of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from optstate_codecs.engine.cpu.operations import C_TYPES, STORED
from optstate_codecs.engine.cpu.peephole import FINITE
from optstate_codecs.engine.cpu.value import ROW, Value

__all__ = ["Loop", "Names"]

# elements of a piece: what is widened for it stays in the first cache
PIECE = 256
WIDE = (torch.float32, torch.int32)
PLACES = {"low": "2 * (c + j)", "high": "2 * (c + j) + 1", "pair": "(c + j) >> 1"}


class Names:
    """What numbers are called, and which are kept in arrays of a row.

    Attributes:
        kept: needed in other loops than their own.
        users: of each number.
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
        names: of all numbers.
        tensors: the dtype and span of inputs that are tensors.
        draws: stream, and whether mirrored, of inputs that are random numbers.
        length: iterations.
        values: what to compute, in order.
        reduced: what to find the largest magnitude of.
        stores: what to write into inputs.
        flags: what must hold for every element.
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
        self._length, self._piece = length, min(length, PIECE)
        self._values, self._reduced, self._stores = values, reduced, stores
        self._flags = flags
        self._before: list[str] = []
        self._inside: list[str] = []
        self._after: list[str] = []
        self._loaded: dict[Value, str] = {}
        self._words: set[str] = set()

    def lines(self) -> list[str]:
        """The loop in C; nothing where there is nothing to do."""
        if not self._values and not self._reduced and not self._stores:
            return []
        for value in self._values:
            self._compute(value)
        for value in self._reduced:
            # bits of floats that are not negative are in order, and NaN is above all
            bits = f"as_int(__builtin_fabsf({self._local(value.needs[0])}))"
            most = f"most_{self._names[value]}"
            self._inside.append(f"{most} = {bits} > {most} ? {bits} : {most};")
        end = self._check()
        for name, value in self._stores.items():
            self._store(name, value)
        found = [self._names[value] for value in self._reduced]
        return [
            *(f"int32_t most_{name} = 0;" for name in found),
            f"for (int c = 0; c < {self._length}; c += {self._piece}) {{",
            *("    " + line for line in self._before),
            f"    for (int j = 0; j < {self._piece}; j++) {{",
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
            return  # written where it is asked for
        needs = [self._local(need, value.kind) for need in value.needs]
        text = value.text.format(*needs)
        if value.kind == "pair":
            text = f"(j & 1 ? {needs[1]} : {needs[0]})"
        self._inside.append(f"const {C_TYPES[value.dtype]} {name} = {text};")
        if value in self._names.kept:
            self._inside.append(f"kept_{name}[c + j] = {name};")

    def _check(self) -> list[str]:
        """Look at the flags; gives the lines after the loop that do."""
        # the largest magnitude tells whether all are finite
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
        """How a number is called in this loop by one of ``kind`` that needs it."""
        name = self._names[need]
        if need.space <= ROW or need in self._values:
            return name
        if need.kind == "input":
            return self._load(need)
        text = f"kept_{name}[{PLACES.get(kind, 'c + j')}]"
        return f"({text} != 0)" if need.dtype == torch.bool else text

    def _load(self, value: Value) -> str:
        if value not in self._loaded:
            self._loaded[value] = self._read(value)
        return self._loaded[value]

    def _read(self, value: Value) -> str:
        """How an input is called here; one that is narrow is widened first."""
        name, wide = value.text, f"wide_{self._names[value]}"
        if name in self._draws:
            self._draw(name, wide)
        elif self._tensors[name][0] in WIDE:
            return f"{name}[c + j]"
        else:
            self._piecewise(self._before, f"{wide}[j] = {name}[c + j]")
            self._before.insert(len(self._before) - 1, f"int32_t {wide}[{self._piece}];")
        return f"{wide}[j]"

    def _piecewise(self, lines: list[str], statement: str) -> None:
        lines.append(f"for (int j = 0; j < {self._piece}; j++) {statement};")

    def _draw(self, name: str, wide: str) -> None:
        """16 random bits an element, out of words of two elements; see ``rounding``."""
        stream, mirrored = self._draws[name]
        words = f"words{stream // 2}" + "_mirrored" * mirrored
        if words not in self._words:
            self._words.add(words)
            self._hash(words, list(self._draws).index(name), mirrored)
        half, halves = self._piece // 2, f"halves_{wide}"
        turned = f"({words}[j] << 16 | {words}[j] >> 16)" if stream % 2 else f"{words}[j]"
        flip = " ^ (step & 1 ? 0xffff : 0)" if mirrored else ""
        self._before += [
            f"int32_t {wide}[{self._piece}];",
            f"uint32_t turned_{wide}[{half}];",
            f"uint16_t {halves}[{self._piece}];",
            f"for (int j = 0; j < {half}; j++) turned_{wide}[j] = {turned};",
            f"memcpy({halves}, turned_{wide}, sizeof {halves});",
        ]
        self._piecewise(self._before, f"{wide}[j] = {halves}[j]{flip}")

    def _hash(self, words: str, place: int, mirrored: bool) -> None:
        """A word for each two elements."""
        half = self._piece // 2
        odd = "0" if mirrored else "step & 1"
        self._before += [
            f"uint32_t {words}[{half}];",
            "{",
            "    const uint32_t turn = (uint32_t)step & ~1u;",
            f"    const uint32_t factor = 0x846ca68bu * ({odd} ? 747796405u : 1u);",
            "    const uint64_t first = (start + c) >> 1;",
            f"    const uint32_t low = (uint32_t)first + mix32(keys[{2 * place}] + turn);",
            f"    const uint32_t high = mix32(keys[{2 * place + 1}] ^ (turn * 0x9e3779b9u))",
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
        self._before.append(f"int32_t new_{name}[{self._piece}];")
        self._inside.append(f"new_{name}[j] = {text};")
        self._piecewise(self._after, f"{name}[c + j] = ({STORED[dtype]})new_{name}[j]")
