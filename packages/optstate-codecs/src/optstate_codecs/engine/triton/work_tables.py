"""Work tables, which assign tiles to the programs of a launch, and uploads without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from optstate_codecs.tables import cached_table

__all__ = ["kept_work_table", "on", "uploaded", "work_table"]


def work_table(tiles: Sequence[int], device: torch.device) -> Tensor:
    """The tensor of each tile and the tile's index in it, int32 [sum of tiles, 2].

    Args:
        tiles: how many tiles each tensor has.
        device: where the kernel runs.
    """
    counts = torch.tensor(tiles, dtype=torch.int64, device="cpu")
    numbers = torch.arange(len(tiles), dtype=torch.int64, device="cpu")
    tensor = torch.repeat_interleave(numbers, counts)
    every = torch.arange(len(tensor), dtype=torch.int64, device="cpu")
    index = every - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, index], 1).to(torch.int32).to(device)


@cached_table(maxsize=256)
def kept_work_table(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """``work_table``, cached."""
    return work_table(tiles, device)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` current: triton launches on the current GPU, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def uploaded(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table from the host to ``device`` without waiting for it."""
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)
