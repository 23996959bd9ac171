"""The tables of a launch: which program does what, and how numbers reach the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from optstate_codecs.tables import cached_table

__all__ = ["kept_work_table", "on", "uploaded", "work_table"]


def work_table(tiles: Sequence[int], device: torch.device) -> Tensor:
    """One row a tile, int32 [sum of tiles, 2]: its tensor, and its place in that tensor.

    Args:
        tiles: how many each tensor has.
        device: where the kernel runs.
    """
    counts = torch.tensor(tiles, dtype=torch.int64, device="cpu")
    numbers = torch.arange(len(tiles), dtype=torch.int64, device="cpu")
    tensor = torch.repeat_interleave(numbers, counts)
    every = torch.arange(len(tensor), dtype=torch.int64, device="cpu")
    place = every - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, place], 1).to(torch.int32).to(device)


@cached_table(maxsize=256)
def kept_work_table(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """``work_table``, the same one as long as it is wanted often; there when it is returned."""
    return work_table(tiles, device)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Where a kernel is launched: triton takes the current GPU, whatever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def uploaded(table: Tensor, device: torch.device) -> Tensor:
    """``table``, which is on the host, on the device, without waiting for a GPU."""
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)
