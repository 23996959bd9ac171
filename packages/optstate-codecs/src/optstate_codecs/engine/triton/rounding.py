"""The kernel for stochastic rounding, or adding and rounding, of many tensors in one launch.

A program rounds one tile. ``table``, int64, COLUMNS a tensor: element count, addresses of target
and source, stream key, count of the draw. The device decides whether a tile may be accessed 16
bytes at once, from the addresses and the elements left, so that tensors of any size share a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from optstate_codecs.engine.triton.dtypes import load_float, pointer_at, triton_type
from optstate_codecs.engine.triton.launch import ELEMENTS_PER_WARP
from optstate_codecs.engine.triton.launcher import Launcher
from optstate_codecs.engine.triton.work_tables import kept_work_table, uploaded
from optstate_codecs.rounding import packed_key
from optstate_codecs.triton_lib import half, hash_tile, jit, tl, to_bf16_bits_stochastic

__all__ = ["launch", "round_kernel"]

COLUMNS = 5
TILE = 2048


@jit
def _round_tile(  # type: ignore[no-untyped-def]
    entry,
    start,
    left,
    ADD: tl.constexpr,
    SOURCE_TYPE: tl.constexpr,
    SOURCE_BF16: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Round ``left`` elements from ``start`` on; elements 2 i and 2 i + 1 share a random word."""
    target = pointer_at(entry + 1, tl.int16, DIVISIBLE) + start
    source = pointer_at(entry + 2, SOURCE_TYPE, DIVISIBLE) + start
    offsets = tl.arange(0, TILE)
    mask = offsets < left
    x = load_float(source, offsets, mask, SOURCE_BF16)
    if ADD:
        x = load_float(target, offsets, mask, True) + x
    word = hash_tile(tl.load(entry + 3), tl.load(entry + 4).to(tl.int32), start, offsets)
    tl.store(target + offsets, to_bf16_bits_stochastic(x, half(word, offsets, 0)), mask=mask)


@jit
def round_kernel(  # type: ignore[no-untyped-def]
    work,
    table,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    SOURCE_TYPE: tl.constexpr,
    SOURCE_BF16: tl.constexpr,
    TILE: tl.constexpr,
):
    """Round one tile; see the module's docstring for the table."""
    program = tl.program_id(0)
    entry = table + tl.load(work + 2 * program).to(tl.int64) * COLUMNS
    start = tl.load(work + 2 * program + 1).to(tl.int64) * TILE
    left = tl.load(entry) - start
    wide = ((tl.load(entry + 1) | tl.load(entry + 2)) & 15) == 0
    if wide & (left >= TILE):
        # a constant, so that the compiler drops the masks
        every = tl.full([], TILE, tl.int32)
        _round_tile(entry, start, every, ADD, SOURCE_TYPE, SOURCE_BF16, 16, TILE)
    else:
        rest = tl.minimum(left, TILE).to(tl.int32)
        _round_tile(entry, start, rest, ADD, SOURCE_TYPE, SOURCE_BF16, 1, TILE)


def launch(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    seed: int,
    numbers: Sequence[int],
    counts: Sequence[int],
    stream: int,
    add: bool,
) -> None:
    """Round ``sources``, all of one dtype and device, into ``targets``, in one launch.

    Each pair is dense with equal strides, and ``stream`` is even. The other arguments are those of
    ``stochastic.round_``.
    """
    sizes = [target.numel() for target in targets]
    device, dtype = targets[0].device, sources[0].dtype
    entries = []
    for size, target, source, number, count in zip(
        sizes, targets, sources, numbers, counts, strict=True
    ):
        key = packed_key(seed, number, stream // 2)
        entries += [size, target.data_ptr(), source.data_ptr(), key, count]
    work = kept_work_table(tuple([-(-size // TILE) for size in sizes]), device)
    if not work.shape[0]:
        return  # tensors without elements
    table = uploaded(torch.tensor(entries, dtype=torch.int64, device="cpu"), device)
    _launcher(device, dtype, add)(work.shape[0], [work, table])


@lru_cache(maxsize=64)
def _launcher(device: torch.device, dtype: torch.dtype, add: bool) -> Launcher:
    """The launcher of the kernel for sources of ``dtype`` on ``device``."""
    constants = {
        "COLUMNS": COLUMNS,
        "ADD": add,
        "SOURCE_TYPE": triton_type(dtype),
        "SOURCE_BF16": dtype == torch.bfloat16,
        "TILE": TILE,
        "num_warps": TILE // ELEMENTS_PER_WARP,
        "enable_fp_fusion": False,
    }
    return Launcher(round_kernel, constants)
