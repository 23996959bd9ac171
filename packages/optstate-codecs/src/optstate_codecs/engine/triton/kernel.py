"""The multi-tensor kernel: one launch steps every tile of every tensor in a bucket.

A program steps one tile, ROWS blocks of consecutive elements. It reads the tensor's addresses from
a table, decodes, updates, encodes and writes. The device functions for that are compile-time
arguments, so that a new format or rule needs no new kernel.

A block is FOLD pieces of the tile, [FOLD * ROWS, BLOCK / FOLD], so that all elements of a thread
belong to one block. Finding a block's maximum then takes fewer exchanges between threads, and each
thread handles one scale.

Tables, see ``buckets`` and ``step_tables``:

- ``tensors``, int64, COLUMNS a tensor: element count; address of the parameter; addresses of two
  components of each of three moments; two stream keys; address of the component of the write; the
  start in ``means`` and the two numbers of ``centralization.mean_layout``; the index of the first
  element in the numbering of random numbers.
- ``grads``, int64: addresses of the gradients.
- ``scalars``, float32, SCALARS for each (group, step count): the step count, then the rule's.
- ``scalar_set``, int32: the index of each tensor's set of scalars.
"""

from __future__ import annotations

from optstate_codecs.counts import END, OFFSET
from optstate_codecs.engine.triton.dtypes import load_float, pointer_at
from optstate_codecs.state.moments import SMALLEST_ROOT
from optstate_codecs.triton_lib import (
    as_bits,
    constant,
    fma,
    half,
    hash_tile,
    jit,
    minus_product,
    paired_tile,
    piece_starts,
    reciprocal,
    sqrt,
    tl,
    to_bf16_bits,
    to_bf16_bits_stochastic,
)

__all__ = ["step_kernel"]

_SMALLEST_ROOT = constant(SMALLEST_ROOT)
_END, _OFFSET = constant(float(END)), constant(OFFSET)


@jit
def _write(  # type: ignore[no-untyped-def]
    p_pointer,
    c_pointer,
    p,
    word,
    offsets,
    mask,
    P_BF16: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WRITE: tl.constexpr,
    WRITE_OPTIONS: tl.constexpr,
):
    if WRITE is not None:
        WRITE(p_pointer, c_pointer, p, half(word, offsets, 0), offsets, mask, WRITE_OPTIONS)
    elif P_BF16:
        if STOCHASTIC:
            bits = to_bf16_bits_stochastic(p, half(word, offsets, 0))
        else:
            bits = to_bf16_bits(p)
        tl.store(p_pointer + offsets, bits, mask=mask)
    else:
        tl.store(p_pointer + offsets, p.to(p_pointer.dtype.element_ty), mask=mask)


@jit
def _random(  # type: ignore[no-untyped-def]
    entry,
    step,
    origin,
    offsets,
    WORD0: tl.constexpr,
    WORD1: tl.constexpr,
    EVEN0: tl.constexpr,
    EVEN1: tl.constexpr,
):
    """The words of random bits that formats and write need, and those of the even step before."""
    word0 = offsets
    word1 = offsets
    even0 = offsets
    even1 = offsets
    if WORD0:
        word0 = hash_tile(tl.load(entry + 8), step, origin, offsets)
    if WORD1:
        word1 = hash_tile(tl.load(entry + 9), step, origin, offsets)
    if EVEN0:
        even0 = paired_tile(tl.load(entry + 8), step, origin, offsets)
    if EVEN1:
        even1 = paired_tile(tl.load(entry + 9), step, origin, offsets)
    return word0, word1, even0, even1


@jit
def step_kernel(  # type: ignore[no-untyped-def]
    work,
    tensors,
    grads,
    scalar_set,
    scalars,
    means,
    grad_scale,
    found_inf,
    SCALARS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPDATE: tl.constexpr,
    UPDATE_OPTIONS: tl.constexpr,
    FEEDBACK: tl.constexpr,
    HAS_FEEDBACK: tl.constexpr,
    MOMENTS: tl.constexpr,
    LOAD0: tl.constexpr,
    STORE0: tl.constexpr,
    OPTIONS0: tl.constexpr,
    FIRST0: tl.constexpr,
    SECOND0: tl.constexpr,
    SQRT0: tl.constexpr,
    UPDATE_UNITS0: tl.constexpr,
    STREAM0: tl.constexpr,
    RANDOM0: tl.constexpr,
    PAIRED0: tl.constexpr,
    SPAN0: tl.constexpr,
    SHARED0: tl.constexpr,
    DIVISIBLE0: tl.constexpr,
    LOAD1: tl.constexpr,
    STORE1: tl.constexpr,
    OPTIONS1: tl.constexpr,
    FIRST1: tl.constexpr,
    SECOND1: tl.constexpr,
    SQRT1: tl.constexpr,
    STREAM1: tl.constexpr,
    PAIRED1: tl.constexpr,
    SPAN1: tl.constexpr,
    SHARED1: tl.constexpr,
    DIVISIBLE1: tl.constexpr,
    LOAD2: tl.constexpr,
    STORE2: tl.constexpr,
    OPTIONS2: tl.constexpr,
    FIRST2: tl.constexpr,
    SECOND2: tl.constexpr,
    SQRT2: tl.constexpr,
    STREAM2: tl.constexpr,
    PAIRED2: tl.constexpr,
    SPAN2: tl.constexpr,
    SHARED2: tl.constexpr,
    DIVISIBLE2: tl.constexpr,
    WORD0: tl.constexpr,
    WORD1: tl.constexpr,
    EVEN0: tl.constexpr,
    EVEN1: tl.constexpr,
    P_TYPE: tl.constexpr,
    P_BF16: tl.constexpr,
    G_TYPE: tl.constexpr,
    G_BF16: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SPLIT: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    WRITE_OPTIONS: tl.constexpr,
    C_TYPE: tl.constexpr,
    C_DIVISIBLE: tl.constexpr,
    MARKS0: tl.constexpr,
    MARKS1: tl.constexpr,
    MARKS2: tl.constexpr,
    CENTRALIZED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    FULL: tl.constexpr,
):
    """Step one tile; see the module's docstring for the tables."""
    if HAS_FOUND_INF:  # noqa: SIM102 - the inner condition is a device value
        if tl.load(found_inf) != 0.0:
            return
    program = tl.program_id(0)
    tensor = tl.load(work + 2 * program)
    tile = tl.load(work + 2 * program + 1)
    entry = tensors + tensor.to(tl.int64) * COLUMNS
    numel = tl.load(entry)
    start = tile.to(tl.int64) * (ROWS * BLOCK)
    scalars += tl.load(scalar_set + tensor) * SCALARS
    count = tl.load(scalars)
    # ``counts.taken``
    whole = tl.minimum(count, _END).to(tl.int32)
    step = tl.where(count < _END, whole, as_bits(count) - _OFFSET)

    row_offsets = tl.arange(0, ROWS)
    length: tl.constexpr = BLOCK // FOLD
    starts = piece_starts(length, FOLD * ROWS, ROWS)
    offsets = starts[:, None] + tl.arange(0, length)[None, :]
    if FULL:
        # a constant, so that the compiler drops the masks
        left = tl.full([], ROWS * BLOCK, tl.int32)
    else:
        left = tl.minimum(numel - start, ROWS * BLOCK).to(tl.int32)
        # a mask that changes only at multiples of 16 keeps accesses wide
        left = tl.multiple_of(left, WHOLE)
    mask = offsets < left
    first_row = tile.to(tl.int64) * ROWS

    p_pointer = pointer_at(entry + 1, P_TYPE, DIVISIBLE) + start
    g_pointer = pointer_at(grads + tensor, G_TYPE, DIVISIBLE) + start
    if SPLIT:
        c_pointer = pointer_at(entry + 10, C_TYPE, C_DIVISIBLE) + start
        p = READ(p_pointer, c_pointer, offsets, mask, WRITE_OPTIONS)
    else:
        c_pointer = p_pointer
        p = load_float(p_pointer, offsets, mask, P_BF16)
    g = load_float(g_pointer, offsets, mask, G_BF16)
    if CENTRALIZED:
        inside, outside = tl.load(entry + 12), tl.load(entry + 13)
        # 64-bit arithmetic for the tile's first element only
        index = start // inside
        within = ((start - index * inside).to(tl.int32) + offsets) // inside.to(tl.int32)
        index = ((index % outside).to(tl.int32) + within) % outside.to(tl.int32)
        g = g - tl.load(means + tl.load(entry + 11) + index)
    if HAS_SCALE:
        g = g * tl.load(grad_scale)

    first0 = pointer_at(entry + 2, FIRST0, DIVISIBLE0) + start // SPAN0 * SHARED0
    second0 = pointer_at(entry + 3, SECOND0, 1) + first_row
    m0 = p
    if MOMENTS >= 1:
        m0, signs = LOAD0(first0, second0, offsets, row_offsets, left, False, OPTIONS0)
    if MOMENTS >= 2:
        first1 = pointer_at(entry + 4, FIRST1, DIVISIBLE1) + start // SPAN1 * SHARED1
        second1 = pointer_at(entry + 5, SECOND1, 1) + first_row
        m1, signs1 = LOAD1(first1, second1, offsets, row_offsets, left, False, OPTIONS1)
        signs = signs | signs1
    if MOMENTS >= 3:
        first2 = pointer_at(entry + 6, FIRST2, DIVISIBLE2) + start // SPAN2 * SHARED2
        second2 = pointer_at(entry + 7, SECOND2, 1) + first_row
        m2, signs2 = LOAD2(first2, second2, offsets, row_offsets, left, False, OPTIONS2)
        signs = signs | signs2
    if MARKS0 or MARKS1 or MARKS2:
        # once for all moments, since the minimum over a tile takes exchanges between threads
        marked = tl.min(signs, axis=0) < 0
        if marked:
            if MARKS0:
                m0, signs = LOAD0(first0, second0, offsets, row_offsets, left, True, OPTIONS0)
            if MARKS1:
                m1, signs1 = LOAD1(first1, second1, offsets, row_offsets, left, True, OPTIONS1)
            if MARKS2:
                m2, signs2 = LOAD2(first2, second2, offsets, row_offsets, left, True, OPTIONS2)
    if MOMENTS < 2:
        m1 = m0
    if MOMENTS < 3:
        m2 = m0
    if SQRT2:
        m2 = m2 * m2
    if UPDATE_UNITS0:
        m0 = m0 * (m1 if SQRT1 else sqrt(m1))
    if SQRT0:
        m0 = m0 * m0
    if SQRT1:
        m1 = m1 * m1

    p, m0, m1, m2 = UPDATE(p, g, m0, m1, m2, scalars + 1, UPDATE_OPTIONS)
    if HAS_FEEDBACK:
        # here and not after stores, so that the compiler uses the update's loads and quotients
        feedback = FEEDBACK(m1, m2, scalars + 1, UPDATE_OPTIONS)

    origin = start + tl.multiple_of(tl.load(entry + 14), 16)
    if RANDOM0 or not HAS_FEEDBACK:
        word0, word1, even0, even1 = _random(
            entry, step, origin, offsets, WORD0, WORD1, EVEN0, EVEN1
        )
    if not HAS_FEEDBACK:
        # before encoding, so that its registers are free
        _write(
            p_pointer, c_pointer, p, word0, offsets, mask, P_BF16, STOCHASTIC, WRITE, WRITE_OPTIONS
        )

    x0 = m0
    if UPDATE_UNITS0:
        x0 = m0 * reciprocal(tl.maximum(sqrt(m1), _SMALLEST_ROOT))
    if SQRT0:
        x0 = sqrt(m0)
    random0 = offsets
    if RANDOM0:
        if PAIRED0:
            random0 = half(even1 if STREAM0 >= 2 else even0, offsets, STREAM0)
        else:
            random0 = half(word1 if STREAM0 >= 2 else word0, offsets, STREAM0)
    if HAS_FEEDBACK:
        if UPDATE_UNITS0:
            # the residual's two terms apart, so that m0 needs no registers during the encoding
            p = fma(m0, feedback, p)
            feedback = feedback * sqrt(m1)
        kept = STORE0(first0, second0, x0, random0, offsets, row_offsets, left, OPTIONS0)
        if UPDATE_UNITS0:
            p = minus_product(p, kept, feedback)
        else:
            p = fma(m0 - kept, feedback, p)
        if not RANDOM0:
            word0, word1, even0, even1 = _random(
                entry, step, origin, offsets, WORD0, WORD1, EVEN0, EVEN1
            )
        _write(
            p_pointer, c_pointer, p, word0, offsets, mask, P_BF16, STOCHASTIC, WRITE, WRITE_OPTIONS
        )
    elif MOMENTS >= 1:
        STORE0(first0, second0, x0, random0, offsets, row_offsets, left, OPTIONS0)
    if MOMENTS >= 2:
        x1 = sqrt(m1) if SQRT1 else m1
        if PAIRED1:
            random1 = half(even1 if STREAM1 >= 2 else even0, offsets, STREAM1)
        else:
            random1 = half(word1 if STREAM1 >= 2 else word0, offsets, STREAM1)
        STORE1(first1, second1, x1, random1, offsets, row_offsets, left, OPTIONS1)
    if MOMENTS >= 3:
        x2 = sqrt(m2) if SQRT2 else m2
        if PAIRED2:
            random2 = half(even1 if STREAM2 >= 2 else even0, offsets, STREAM2)
        else:
            random2 = half(word1 if STREAM2 >= 2 else word0, offsets, STREAM2)
        STORE2(first2, second2, x2, random2, offsets, row_offsets, left, OPTIONS2)
