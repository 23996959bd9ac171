"""Generates the C++ source of a kernel: a function for one block, and one for all tensors.

The code allocates nothing: the arrays between a block's loops lie on the stack.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from optstate_codecs.engine.cpu.loop import KernelInputs
from optstate_codecs.engine.cpu.operations import STORED, literal
from optstate_codecs.engine.cpu.prelude import PRELUDE
from optstate_codecs.engine.cpu.schedule import block_lines
from optstate_codecs.engine.cpu.torch_root import MODE
from optstate_codecs.engine.cpu.value import ELEMENT, Lowered, is_row

__all__ = ["HEAD", "MEANS", "emit", "width"]

# columns of the table before the addresses: element count; number of the tensor's first block among
# those of all tensors; the step count that keys random numbers; the first element's position in the
# numbering of random numbers; and, for the means, the two numbers of ``centralization.mean_layout``
HEAD = 6
# the name of the input that has the means subtracted from gradients: where there is one, its
# address follows the gradient's
MEANS = "means"
TABLE_LENGTH = 16

RUN = """
extern "C" void run(int64_t tensors, int64_t blocks, const int64_t *table, const float *scalars,
                    const uint32_t *keys, int threads) {
    const int64_t most = blocks * BLOCK / 16384;
    if (threads > most) threads = most > 1 ? (int)most : 1;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
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

HELPERS = """
#define ALIGNED alignas(64)
#if LANES > 1
#define CONSTANT(name, text) const float name = text
#else
/* compilers that see a constant turn minima into branches */
#define CONSTANT(name, text) \\
    static volatile float fixed_##name = text; const float name = fixed_##name
#endif
static const int32_t counting[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
/* torch's square root in one thread, where it is not rounded correctly; see ``torch_root`` */
extern "C" { void *torch_root = 0, *root_threads = 0; }
INLINE void roots(int count, const float *x, float *y) {
    const int before = ((int (*)(int))root_threads)(1);
    ((void (*)(int, const float *, float *, int64_t))torch_root)(count, x, y, TORCH_ROOT_MODE);
    ((int (*)(int))root_threads)(before);
}
INLINE float row_length(int64_t size, int64_t row, int64_t left) {
    const int64_t count = left - row * size;
    return (float)(count > size ? size : count < 1 ? 1 : count);
}
/* zero the codes after the first left ones, in a last group of codes that share bytes */
INLINE void clear_padding(uint8_t *codes, int64_t left, int group, int bytes) {
    uint8_t *last = codes + left / group * bytes;
    const int used = (int)(left % group) * (8 * bytes / group);
    for (int k = 0; k < bytes && used; k++) {
        const int bits = used - 8 * k;
        last[k] &= bits >= 8 ? 255 : bits <= 0 ? 0 : (1 << bits) - 1;
    }
}
/* the mean of each element from number first on; INNER elements share one of ROWS means */
static void spread_means(const int64_t *entry, const float *means, int64_t first, int64_t count,
                         float *out) {
    int64_t at = 0;
    while (at < count) {
        const int64_t row = (first + at) / entry[4], end = (row + 1) * entry[4] - first;
        const float mean = means[row % entry[5]];
        for (const int64_t stop = end < count ? end : count; at < stop; at++) out[at] = mean;
    }
}
"""


def width(inputs: KernelInputs) -> int:
    """Columns of the table."""
    return HEAD + len(inputs.tensors)


def emit(fast: Lowered, slow: Lowered, inputs: KernelInputs) -> str:
    """The C++ source of a kernel.

    Args:
        fast: steps a block where its assumptions hold.
        slow: steps it otherwise.
        inputs: of the kernel.

    Returns:
        The source of ``run(tensors, blocks, table, scalars, keys, threads)``. Its tables have one
        entry a tensor: ``table``, int64, the ``HEAD`` columns and the addresses of all inputs that
        are tensors; ``scalars``, float32; ``keys``, uint32, two for each draw.
    """
    source = [
        PRELUDE,
        f"#define TORCH_ROOT_MODE {MODE}",
        f"enum {{ BLOCK = {inputs.block_size}, WIDTH = {width(inputs)} }};",
        HELPERS,
    ]
    source.append(f"enum {{ SCALARS = {len(inputs.scalars)}, KEYS = {2 * len(inputs.draws)} }};")
    for name, values in {**fast.tables, **slow.tables}.items():
        padded = [*values, *[0.0] * (-len(values) % TABLE_LENGTH)]
        numbers = ", ".join(literal(value, torch.float32) for value in padded)
        source.append(f"static const float {name}[{len(padded)}] = {{{numbers}}};")
    pointers = [f"{STORED[dtype]} *__restrict {n}" for n, (dtype, _) in inputs.tensors.items()]
    others = "const float *scalars, const uint32_t *keys, uint64_t start, int64_t step"
    others += ", int64_t left"
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
    for column, (name, (dtype, space)) in enumerate(inputs.tensors.items(), HEAD):
        stored = STORED[dtype]
        if name == MEANS:
            count = "(left < BLOCK ? left : BLOCK)"
            lines += [
                "    ALIGNED float means[BLOCK] = {0};",
                f"    spread_means(entry, (const float *)entry[{column}], first, {count}, means);",
            ]
            continue
        offset = f"block * {inputs.entries(space)}"
        lines.append(f"    {stored} *{name} = ({stored} *)entry[{column}] + {offset};")
    others = "scalars, keys, (uint64_t)(first + entry[3]), entry[2], left"
    whole = ", ".join([*inputs.tensors, others])
    lines += ["    if (left >= BLOCK) {", f"        if (!fast({whole})) slow({whole});"]
    lines += ["        return;", "    }"]
    names, back = [], []
    for name, (dtype, space) in inputs.tensors.items():
        if name == MEANS:
            names.append(name)
            continue
        names.append(f"end_{name}")
        size = f"sizeof *{name} * ({_length(space)})"
        length = inputs.entries(space)
        lines.append(f"    ALIGNED {STORED[dtype]} end_{name}[{length}] = {{0}};")
        lines.append(f"    memcpy(end_{name}, {name}, {size});")
        if space < ELEMENT and not is_row(space):
            given = f"end_{name}, left, {space.denominator}, {space.numerator}"
            back.append(f"    clear_padding({given});")
        if name != "grad":
            back.append(f"    memcpy({name}, end_{name}, {size});")
    part = ", ".join([*names, others])
    return [*lines, f"    if (!fast({part})) slow({part});", *back, "}"]


def _length(space: Fraction) -> str:
    """Entries of ``left`` elements; the last ones may be shared by fewer than others."""
    if space == ELEMENT:
        return "left"
    group, shared = space.denominator, space.numerator
    return f"(left + {group - 1}) / {group} * {shared}"
