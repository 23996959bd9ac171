"""Codecs: how the wrapper stores the tensors of a state key.

A codec is a thin layer over a format of ``optstate_codecs``, or over none. ``as_codec`` also takes
a format or its text, so every format there is a codec here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optstate_codecs.formats import BF16, FP16, FP32, Format, Int8, as_format
from optstate_codecs.rounding import Counter
from optstate_wrap.state.record import Coded, decode_state, encode_state

__all__ = [
    "BF16Codec",
    "Codec",
    "FP16Codec",
    "FP32Codec",
    "IdentityCodec",
    "Int8MomentumCodec",
    "as_codec",
]


@dataclass(frozen=True)
class Codec:
    """The format in which the tensors of one state key are stored.

    Args:
        format: a format or its text; None stores each tensor as the optimizer made it.

    Examples:
        >>> Codec("int8(block_size=64)").nbytes(4096)
        4352
    """

    format: Format | str | None = None

    def __post_init__(self) -> None:
        if self.format is not None:
            object.__setattr__(self, "format", as_format(self.format))

    @property
    def stored(self) -> Format | None:
        """The format, or None if tensors are stored unchanged."""
        return None if self.format is None else as_format(self.format)

    def encode(self, x: Tensor, counter: Counter | None = None) -> Tensor | Coded:
        """Encode one tensor as the wrapper does; ``counter`` keys random numbers."""
        counter = counter or Counter(0, 1, 0)
        stored: Tensor | Coded = encode_state({"x": x}, x, {"x": self.stored}, counter)["x"]
        return stored

    def decode(self, stored: Tensor | Coded) -> Tensor:
        """A copy of the tensor that ``encode`` stored."""
        value: Tensor = decode_state({"x": stored})["x"]
        return value

    def nbytes(self, numel: int, itemsize: int = 4) -> int:
        """Exact bytes for a tensor of ``numel`` elements that take ``itemsize`` bytes each."""
        return numel * itemsize if self.stored is None else self.stored.nbytes(numel)


class IdentityCodec(Codec):
    """Stores each tensor as the optimizer made it, bit for bit and in its dtype."""

    def __init__(self) -> None:
        super().__init__(None)


class FP32Codec(Codec):
    """Float32: exact for all state except float64, whose size it halves."""

    def __init__(self) -> None:
        super().__init__(FP32())


class FP16Codec(Codec):
    """Float16 with a scale per block, for first moments; see ``optstate_codecs.formats.FP16``.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
    """

    def __init__(self, block_size: int = 2048) -> None:
        super().__init__(FP16(block_size))


class BF16Codec(Codec):
    """Bfloat16 for any moment.

    Args:
        rounding: "stochastic" or "nearest".
    """

    def __init__(self, rounding: str = "stochastic") -> None:
        super().__init__(BF16(rounding))


class Int8MomentumCodec(Codec):
    """Linear int8 with a scale per block, for first moments.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
    """

    def __init__(self, block_size: int = 256) -> None:
        super().__init__(Int8(block_size))


def as_codec(value: Codec | Format | str | None) -> Codec:
    """The codec of a format, its text or None (exact); a codec is returned itself."""
    return value if isinstance(value, Codec) else Codec(value)
