"""The kernel for gradient centralization: means over all dimensions but the first, in one launch.

A program computes the mean of one slice ``grad[i]``. ``table``, int64, COLUMNS a gradient: its
address, elements a slice, the start of its means in ``means``, and the bits of the float32 that
multiplies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from optstate_codecs.engine.capture import capturing, constant_table
from optstate_codecs.engine.triton.dtypes import load_float, triton_type
from optstate_codecs.engine.triton.launcher import Launcher
from optstate_codecs.engine.triton.work_tables import kept_work_table, uploaded
from optstate_codecs.formats.base import float32_bits
from optstate_codecs.triton_lib import as_float, jit, tl

__all__ = ["launch", "means_kernel"]

COLUMNS = 4
CHUNK = 1024


@jit
def means_kernel(  # type: ignore[no-untyped-def]
    work,
    table,
    means,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
    BF16: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute the mean of one slice; see the module's docstring for the table."""
    program = tl.program_id(0)
    entry = table + tl.load(work + 2 * program).to(tl.int64) * COLUMNS
    index = tl.load(work + 2 * program + 1).to(tl.int64)
    inside = tl.load(entry + 1)
    pointer = tl.load(entry).to(tl.pointer_type(TYPE)) + index * inside
    total = tl.zeros([CHUNK], tl.float32)
    begin = inside * 0
    while begin < inside:
        offsets = begin + tl.arange(0, CHUNK)
        total += load_float(pointer, offsets, offsets < inside, BF16)
        begin += CHUNK
    share = as_float(tl.load(entry + 3).to(tl.int32))
    mean = tl.sum(total, axis=0) / inside.to(tl.float32)
    tl.store(means + tl.load(entry + 2) + index, mean * share)


def launch(
    grads: Sequence[Tensor], starts: Sequence[int], shares: Sequence[float], means: Tensor
) -> None:
    """Write the means of every ``grad[i]``, times the gradient's share, into ``means``.

    Args:
        grads: of one dtype and device, dense, with the first dimension outermost in memory.
        starts: where the means of each begin in ``means``.
        shares: multiply the means of each.
        means: float32, one dimension.
    """
    device, dtype = grads[0].device, grads[0].dtype
    entries = []
    for grad, start, share in zip(grads, starts, shares, strict=True):
        entries += [grad.data_ptr(), grad.numel() // grad.shape[0], start, float32_bits(share)]
    work = kept_work_table(tuple([grad.shape[0] for grad in grads]), device)
    if capturing():
        table = constant_table(entries, device)
    else:
        table = uploaded(torch.tensor(entries, dtype=torch.int64, device="cpu"), device)
    _launcher(device, dtype)(work.shape[0], [work, table, means])


@lru_cache(maxsize=64)
def _launcher(device: torch.device, dtype: torch.dtype) -> Launcher:
    """The launcher of the kernel for gradients of ``dtype`` on ``device``."""
    constants = {
        "COLUMNS": COLUMNS,
        "TYPE": triton_type(dtype),
        "BF16": dtype == torch.bfloat16,
        "CHUNK": CHUNK,
        "num_warps": 2,
    }
    return Launcher(means_kernel, constants)
