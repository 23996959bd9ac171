"""Two 4-bit codes a byte: element 2i in the low half, element 2i + 1 in the high half."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(codes: Tensor) -> Tensor:
    """Integers from 0 to 15, flat, as bytes; an odd tail is filled up with 0."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    low, high = codes.view(-1, 2).unbind(1)
    return low.add(high, alpha=16).to(torch.uint8)


def unpack(bytes_: Tensor) -> Tensor:
    """The codes of every byte, int32; where they were an odd number, one more than that."""
    wide = bytes_.to(torch.int32)
    return torch.stack([wide & 15, wide >> 4], dim=1).view(-1)
