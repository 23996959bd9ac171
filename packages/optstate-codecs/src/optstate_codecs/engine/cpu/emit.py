"""Generates the C source of a kernel: a function for one block, and one for all tensors.

The C code allocates nothing: the arrays between a block's loops lie on the stack.
"""

from __future__ import annotations

import torch

from optstate_codecs.engine.cpu.operations import PRELUDE, STORED, literal
from optstate_codecs.engine.cpu.schedule import KernelInputs, block_lines
from optstate_codecs.engine.cpu.value import BLOCK, ELEMENT, PAIR, Lowered

__all__ = ["HEAD", "emit"]

# columns of the table before the addresses: element count, number of the tensor's first block among
# those of all tensors, the step count that keys random numbers, and the first element's position
# in the numbering of random numbers
HEAD = 4

RUN = """
#ifdef __cplusplus
extern "C"
#endif
void run(int64_t tensors, int64_t blocks, const int64_t *table, const float *scalars,
         const uint32_t *keys, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (blocks * BLOCK > 32768)
    for (int part = 0; part < threads; part++) {
        int64_t tensor = 0;
        const int64_t stop = blocks * (part + 1) / threads;
        for (int64_t block = blocks * part / threads; block < stop; block++) {
            while (tensor + 1 < tensors && table[(tensor + 1) * WIDTH + 1] <= block) tensor++;
            const int64_t *entry = table + tensor * WIDTH;
            step_block(entry, scalars + tensor * SCALARS, keys + tensor * KEYS, block - entry[1]);
        }
    }
}
"""


def emit(fast: Lowered, slow: Lowered, inputs: KernelInputs) -> str:
    """The C source of a kernel.

    Args:
        fast: steps a block where its assumptions hold.
        slow: steps it otherwise.
        inputs: of the kernel.

    Returns:
        The source of ``run(tensors, blocks, table, scalars, keys, threads)``. Its tables have one
        entry a tensor: ``table``, int64, the ``HEAD`` columns and the addresses of all inputs that
        are tensors; ``scalars``, float32; ``keys``, uint32, two for each draw.
    """
    width = HEAD + len(inputs.tensors)
    source = [PRELUDE, f"enum {{ BLOCK = {inputs.block_size}, WIDTH = {width} }};"]
    source.append(f"enum {{ SCALARS = {len(inputs.scalars)}, KEYS = {2 * len(inputs.draws)} }};")
    for name, values in {**fast.tables, **slow.tables}.items():
        numbers = ", ".join(literal(value, torch.float32) for value in values)
        source.append(f"static const float {name}[{len(values)}] = {{{numbers}}};")
    pointers = [f"{STORED[dtype]} *__restrict {n}" for n, (dtype, _) in inputs.tensors.items()]
    others = "const float *scalars, const uint32_t *keys, uint64_t start, int64_t step"
    for name, lowered in (("fast", fast), ("slow", slow)):
        # separate functions, so that each has all registers
        source.append("static __attribute__((noinline))")
        source.append(f"int {name}({', '.join([*pointers, others])}) {{")
        source += ["    " + line for line in block_lines(lowered, inputs)] + ["}"]
    return "\n".join([*source, *_step_block(inputs)]) + RUN


def _step_block(inputs: KernelInputs) -> list[str]:
    """The function that steps one block of a tensor; a short last one in a copy with zeros."""
    lines = [
        "static void step_block(const int64_t *entry, const float *scalars, const uint32_t *keys,",
        "                       int64_t block) {",
        "    const int64_t first = block * BLOCK, left = entry[0] - first;",
    ]
    offsets = {BLOCK: "block", PAIR: "first / 2", ELEMENT: "first"}
    for column, (name, (dtype, _)) in enumerate(inputs.tensors.items(), HEAD):
        stored, offset = STORED[dtype], offsets[inputs.space(name)]
        lines.append(f"    {stored} *{name} = ({stored} *)entry[{column}] + {offset};")
    others = "scalars, keys, (uint64_t)(first + entry[3]), entry[2]"
    whole = ", ".join([*inputs.tensors, others])
    lines += ["    if (left >= BLOCK) {", f"        if (!fast({whole})) slow({whole});"]
    lines += ["        return;", "    }"]
    names, back = [], []
    for name, (dtype, _) in inputs.tensors.items():
        space = inputs.space(name)
        if space == BLOCK:
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
