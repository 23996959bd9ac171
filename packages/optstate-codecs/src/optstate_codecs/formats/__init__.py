"""Formats: how a moment is stored. Each file holds one family: layout, mathematics and code.

========== ======================= ==================================================
name       bits per element        use
========== ======================= ==================================================
fp32       32                      any moment, exactly
bf16       16                      any moment
fp16       16 + 32 / block_size    first moments
int8       8 + 32 / block_size     first moments
dynamic8   8 + 32 / block_size     first moments; unsigned: second moments
fp8        8 + 32 / block_size     first moments; unsigned: second moments
minifloat  8 + 32 / block_size,    first moments; unsigned: second moments
           4 + 16 / block_size
costate    1, 2, 3, 4 or 6,        first moments
           + 16 / block_size
oneq       2, 3, 4, 6 or 8,        second moments
           + 16 / block_size
dynamic4   4 + 32 / block_size     first moments, as published, for comparison
linear4    4 + 32 / block_size     second moments, as published, for comparison; also with scales
                                   per row and column
========== ======================= ==================================================
"""

from optstate_codecs.formats.base import Component, Format
from optstate_codecs.formats.cast import BF16, FP32
from optstate_codecs.formats.costate import CoState
from optstate_codecs.formats.dynamic import Dynamic8
from optstate_codecs.formats.fp8 import FP8
from optstate_codecs.formats.fp16 import FP16
from optstate_codecs.formats.linear import Int4, Int8
from optstate_codecs.formats.minifloat import Minifloat
from optstate_codecs.formats.oneq import OneQ
from optstate_codecs.formats.registry import (
    as_format,
    format_names,
    parse_format,
    register_format,
)
from optstate_codecs.formats.table4 import Dynamic4, Linear4

__all__ = [
    "BF16",
    "FP8",
    "FP16",
    "FP32",
    "CoState",
    "Component",
    "Dynamic4",
    "Dynamic8",
    "Format",
    "Int4",
    "Int8",
    "Linear4",
    "Minifloat",
    "OneQ",
    "as_format",
    "format_names",
    "parse_format",
    "register_format",
]
