"""Lowered records as C: functions for a row, and one that steps all tensors of a table.

Nothing is allocated: what a row needs between its loops lies on the stack.
"""

from __future__ import annotations

import torch

from optstate_codecs.engine.cpu.operations import PRELUDE, STORED, literal
from optstate_codecs.engine.cpu.schedule import KernelInputs, row_lines
from optstate_codecs.engine.cpu.value import ELEMENT, PAIR, ROW, Lowered

__all__ = ["HEAD", "emit"]

# a tensor's entries in the table before its addresses: its elements, the number of its first row
# among those of all tensors, and what keys its random numbers: a count and the place of the first
HEAD = 4

RUN = """
#ifdef __cplusplus
extern "C"
#endif
void run(int64_t units, int64_t rows, const int64_t *table, const float *scalars,
         const uint32_t *keys, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (rows * BLOCK > 32768)
    for (int part = 0; part < threads; part++) {
        int64_t unit = 0;
        const int64_t stop = rows * (part + 1) / threads;
        for (int64_t row = rows * part / threads; row < stop; row++) {
            while (unit + 1 < units && table[(unit + 1) * WIDTH + 1] <= row) unit++;
            const int64_t *at = table + unit * WIDTH;
            one(at, scalars + unit * SCALARS, keys + unit * KEYS, row - at[1]);
        }
    }
}
"""


def emit(fast: Lowered, slow: Lowered, given: KernelInputs) -> str:
    """C for a step.

    Args:
        fast: what a row is stepped by where its assumptions hold.
        slow: what it is stepped by otherwise.
        given: the inputs.

    Returns:
        The source of ``run(units, rows, table, scalars, keys, threads)``. ``table`` is int64, a row
        a tensor: its head, then the addresses of all inputs that are tensors. ``scalars`` is
        float32 and ``keys`` uint32, two for each draw, with a row a tensor too.
    """
    source = [PRELUDE, f"enum {{ BLOCK = {given.block}, WIDTH = {HEAD + len(given.tensors)} }};"]
    source.append(f"enum {{ SCALARS = {len(given.scalars)}, KEYS = {2 * len(given.draws)} }};")
    for name, values in {**fast.tables, **slow.tables}.items():
        numbers = ", ".join(literal(value, torch.float32) for value in values)
        source.append(f"static const float {name}[{len(values)}] = {{{numbers}}};")
    pointers = [f"{STORED[dtype]} *__restrict {n}" for n, (dtype, _) in given.tensors.items()]
    others = "const float *scalars, const uint32_t *keys, uint64_t start, int64_t step"
    for name, lowered in (("fast", fast), ("slow", slow)):
        # as a function of its own, so that either gets all registers
        source.append("static __attribute__((noinline))")
        source.append(f"int {name}({', '.join([*pointers, others])}) {{")
        source += ["    " + line for line in row_lines(lowered, given)] + ["}"]
    return "\n".join([*source, *_one(given)]) + RUN


def _one(given: KernelInputs) -> list[str]:
    """The function that steps one row of a tensor; a shorter last one in a copy with zeros."""
    lines = [
        "static void one(const int64_t *at, const float *scalars, const uint32_t *keys,",
        "                int64_t row) {",
        "    const int64_t first = row * BLOCK, left = at[0] - first;",
    ]
    offsets = {ROW: "row", PAIR: "first / 2", ELEMENT: "first"}
    for place, (name, (dtype, _)) in enumerate(given.tensors.items()):
        stored, offset = STORED[dtype], offsets[given.space(name)]
        lines.append(f"    {stored} *{name} = ({stored} *)at[{HEAD + place}] + {offset};")
    others = "scalars, keys, (uint64_t)(first + at[3]), at[2]"
    whole = ", ".join([*given.tensors, others])
    lines += ["    if (left >= BLOCK) {", f"        if (!fast({whole})) slow({whole});"]
    lines += ["        return;", "    }"]
    names, back = [], []
    for name, (dtype, _) in given.tensors.items():
        space = given.space(name)
        if space == ROW:
            names.append(name)
            continue
        names.append(f"end_{name}")
        length, count = ("BLOCK", "left") if space == ELEMENT else ("BLOCK / 2", "(left + 1) / 2")
        lines.append(f"    {STORED[dtype]} end_{name}[{length}] = {{0}};")
        lines.append(f"    memcpy(end_{name}, {name}, sizeof *{name} * ({count}));")
        if name != "grad":
            back.append(f"    memcpy({name}, end_{name}, sizeof *{name} * ({count}));")
    part = ", ".join([*names, others])
    return [*lines, f"    if (!fast({part})) slow({part});", *back, "}"]
