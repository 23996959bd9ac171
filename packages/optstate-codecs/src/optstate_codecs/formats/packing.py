"""Packing codes of fewer than 8 bits into bytes: element e has bits e b to e b + b - 1.

Bits are little-endian: a byte's lowest bit comes first. A *group* is the smallest run of elements
that fills whole bytes. Packed codes end with a whole group:

    bits            1   2   3   4   6   8
    elements        8   4   8   2   4   1
    bytes           1   1   3   1   3   1
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

__all__ = ["BITS", "group", "pack", "unpack"]

BITS = (1, 2, 3, 4, 6, 8)


def group(bits: int) -> tuple[int, int]:
    """The number of elements and of bytes of a group of ``bits``-bit codes."""
    common = gcd(bits, 8)
    return 8 // common, bits // common


def pack(codes: Tensor, bits: int = 4) -> Tensor:
    """Pack flat integers from 0 to 2^bits - 1 into bytes; missing codes of the last group are 0."""
    if bits == 8:
        return codes.to(torch.uint8)
    elements, bytes_ = group(bits)
    if tail := -codes.numel() % elements:
        codes = torch.nn.functional.pad(codes, (0, tail))
    columns = codes.view(-1, elements).unbind(1)
    word = columns[0]
    for index, column in enumerate(columns[1:], start=1):
        word = word.add(column, alpha=1 << (index * bits))
    if bytes_ == 1:
        return word.to(torch.uint8)
    return torch.stack([word & 255, word >> 8 & 255, word >> 16 & 255], 1).view(-1).to(torch.uint8)


def unpack(bytes_: Tensor, bits: int = 4) -> Tensor:
    """The codes of all groups, int32, with the padding of the last group."""
    word = bytes_.to(torch.int32)
    if bits == 8:
        return word
    elements, count = group(bits)
    if count == 3:
        low, middle, high = word.view(-1, 3).unbind(1)
        word = low + (middle << 8) + (high << 16)
    # the last code needs no mask: no bits lie above it
    codes = [word >> index * bits & (1 << bits) - 1 for index in range(elements - 1)]
    return torch.stack([*codes, word >> (elements - 1) * bits], dim=1).view(-1)
