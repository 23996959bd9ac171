"""Packing codes of fewer than 8 bits into bytes, in torch and on a kernel's tiles.

With b bits per code, element e has bits e b to e b + b - 1, a byte's lowest bit first. A *group* is
the smallest run of elements that fills whole bytes. Packed codes end with a whole group:

    bits            1   2   3   4   6   8
    elements        8   4   8   2   4   1
    bytes           1   1   3   1   3   1
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from optstate_codecs.triton_lib import jit, pair_of_nibbles, piece_starts, third_byte, tl, widened

__all__ = ["BITS", "group", "load_bytes", "load_codes", "pack", "store_codes", "unpack"]

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


@jit
def group_indices(offsets, rows, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Indices of a tile's groups of GROUP elements, [pieces, elements / GROUP]."""
    length: tl.constexpr = offsets.shape[1] // GROUP
    starts = piece_starts(length, offsets.shape[0], rows.shape[0])
    return starts[:, None] + tl.arange(0, length)[None, :]


@jit
def load_bytes(codes, offsets, rows, left):  # type: ignore[no-untyped-def]
    """Load the bytes of a tile of 4-bit codes, uint8 [pieces, elements / 2]."""
    groups = group_indices(offsets, rows, 2)
    return tl.load(codes + groups, mask=groups < left - (left >> 1), other=0)


@jit
def _or(a, b):  # type: ignore[no-untyped-def]
    return a | b


@jit
def byte_offsets(groups, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets of groups of COUNT bytes."""
    if COUNT == 1:
        return groups
    else:
        # This hint is not true, but addresses have no alignment here, so that a thread reads one
        # byte at a time; the hint makes neighbouring threads read neighbouring groups.
        return tl.max_contiguous(groups * COUNT, [1, groups.shape[1]])


@jit
def load_codes(codes, offsets, rows, left, BITS: tl.constexpr, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a tile's codes into int32 from bit SHIFT on."""
    if BITS == 8:
        return widened(tl.load(codes + offsets, mask=offsets < left, other=0)) << SHIFT
    else:
        size: tl.constexpr = 8 if BITS % 2 == 1 else (4 if BITS % 4 == 2 else 2)
        count: tl.constexpr = size * BITS // 8
        groups = group_indices(offsets, rows, size)
        mask = groups * size < left
        bytes_ = byte_offsets(groups, count)
        word = tl.load(codes + bytes_, mask=mask, other=0).to(tl.int32)
        for index in tl.static_range(1, count):
            byte = tl.load(codes + (bytes_ + index), mask=mask, other=0)
            word = word | (byte.to(tl.int32) << (8 * index))
        words = tl.broadcast_to(word[:, :, None], [word.shape[0], word.shape[1], size])
        words = tl.reshape(words, [offsets.shape[0], offsets.shape[1]])
        return ((words >> (offsets % size * BITS)) & ((1 << BITS) - 1)) << SHIFT


@jit
def store_codes(codes, word, offsets, rows, left, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store bits 16 to 16 + BITS - 1 of each int32."""
    if BITS == 8:
        tl.store(codes + offsets, third_byte(word), mask=offsets < left)
    elif BITS == 4:
        half: tl.constexpr = offsets.shape[1] // 2
        low, high = tl.split(tl.reshape(word, [offsets.shape[0], half, 2]))
        groups = group_indices(offsets, rows, 2)
        tl.store(codes + groups, pair_of_nibbles(low, high), mask=groups < left - (left >> 1))
    else:
        size: tl.constexpr = 8 if BITS % 2 == 1 else 4
        count: tl.constexpr = size * BITS // 8
        code = tl.where(offsets < left, (word >> 16) & ((1 << BITS) - 1), 0)
        code = code << (offsets % size * BITS)
        groups = group_indices(offsets, rows, size)
        packed = tl.reduce(tl.reshape(code, [offsets.shape[0], groups.shape[1], size]), 2, _or)
        for index in tl.static_range(count):
            byte = (packed >> (8 * index)).to(tl.uint8)
            tl.store(codes + (byte_offsets(groups, count) + index), byte, mask=groups * size < left)
