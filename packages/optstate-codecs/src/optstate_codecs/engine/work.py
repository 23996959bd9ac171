"""Which program of a launch does what: the table that lists every tile of every tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["work_table"]


def work_table(tiles: Sequence[int], device: torch.device) -> Tensor:
    """One row a tile, int32 [sum of tiles, 2]: its tensor, and its place in that tensor.

    Args:
        tiles: how many each tensor has.
        device: where the kernel runs.
    """
    counts = torch.tensor(tiles)
    tensor = torch.repeat_interleave(torch.arange(len(tiles)), counts)
    place = torch.arange(len(tensor)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, place], 1).to(torch.int32).to(device)
