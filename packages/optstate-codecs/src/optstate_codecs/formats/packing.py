"""Codes of fewer than 8 bits, side by side in bytes: element e in bits e b to e b + b - 1.

Little-endian: a byte's lowest bit comes first. A *group* is the least run of elements that fills
whole bytes, and what is packed ends with one:

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
    """Elements and bytes of a group of codes of ``bits`` bits."""
    common = gcd(bits, 8)
    return 8 // common, bits // common


def pack(codes: Tensor, bits: int = 4) -> Tensor:
    """Integers from 0 to 2^bits - 1, flat, as bytes; a group's missing codes are 0."""
    if bits == 8:
        return codes.to(torch.uint8)
    elements, bytes_ = group(bits)
    if tail := -codes.numel() % elements:
        codes = torch.nn.functional.pad(codes, (0, tail))
    columns = codes.view(-1, elements).unbind(1)
    word = columns[0]
    for place, column in enumerate(columns[1:], start=1):
        word = word.add(column, alpha=1 << (place * bits))
    if bytes_ == 1:
        return word.to(torch.uint8)
    return torch.stack([word & 255, word >> 8 & 255, word >> 16 & 255], 1).view(-1).to(torch.uint8)


def unpack(bytes_: Tensor, bits: int = 4) -> Tensor:
    """The codes of every group, int32; more than were packed where those ended within one."""
    word = bytes_.to(torch.int32)
    if bits == 8:
        return word
    elements, count = group(bits)
    if count == 3:
        low, middle, high = word.view(-1, 3).unbind(1)
        word = low + (middle << 8) + (high << 16)
    # the last needs no mask, since nothing lies above it
    parts = [word >> place * bits & (1 << bits) - 1 for place in range(elements - 1)]
    return torch.stack([*parts, word >> (elements - 1) * bits], dim=1).view(-1)
