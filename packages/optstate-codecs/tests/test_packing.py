"""Codes side by side in bytes, against one long integer; and what formats make of it."""

import pytest
import torch

from optstate_codecs import CoState, Format, OneQ
from optstate_codecs.formats.packing import BITS, group, pack, unpack


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 3, 8, 9, 31])
def test_packed_bytes_are_a_stream_of_bits(bits: int, count: int) -> None:
    """Element e is what one long little-endian number holds from bit e b on."""
    noise = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (count,), generator=noise, dtype=torch.int32)
    number = sum(code << e * bits for e, code in enumerate(codes.tolist()))
    elements, size = {1: (8, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 6: (4, 3), 8: (1, 1)}[bits]
    assert group(bits) == (elements, size)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == number.to_bytes(-(-count // elements) * size, "little")
    unpacked = unpack(packed, bits)
    assert unpacked.dtype == torch.int32
    assert torch.equal(unpacked[:count], codes)
    assert not unpacked[count:].any()


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (CoState(1), 17 + 4),
        (CoState(2), 33 + 4),
        (CoState(3), 51 + 4),
        (CoState(4), 65 + 4),
        (CoState(6, 256), 99 + 2),
        (OneQ(2), 33 + 4),
        (OneQ(3, 16), 51 + 18),
        (OneQ(4), 65 + 4),
        (OneQ(6), 99 + 4),
        (OneQ(8), 130 + 4),
    ],
    ids=lambda value: getattr(value, "spec", value),
)
def test_bytes_of_130_elements(format: Format, expected: int) -> None:
    """Codes in whole groups, the last begun by two elements; and two bytes for each scale."""
    parts = [torch.zeros(c.length(130), dtype=c.dtype) for c in format.components]
    assert format.nbytes(130) == sum(p.numel() * p.element_size() for p in parts) == expected


def test_groups_across_bytes_follow_rows_and_slices() -> None:
    codes = OneQ(3).components[0]
    assert codes.shape((5, 16)) == (5, 6)
    assert codes.shape((5, 12)) == (8 * 3,)
    assert codes.shape(()) == (3,)
    assert codes.part(256, 300) == slice(96, 114)
