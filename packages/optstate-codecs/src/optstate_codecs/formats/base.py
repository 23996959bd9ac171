"""The interface of a format: the tensors that store a moment, and encoding and decoding it."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs.plain import PlainFields
from optstate_codecs.rounding import Draw

__all__ = ["Component", "DeviceFunctions", "Format", "float32_bits", "rounded"]


@dataclass(frozen=True)
class Component:
    """One of the tensors that a moment is stored in.

    Attributes:
        suffix: follows the moment's name in the state key; "" makes the name itself the key.
        dtype: dtype of the stored tensor.
        span: number of consecutive elements that share entries (1: each has its own).
        shared: number of entries that ``span`` elements share; above 1 where codes cross bytes.
        entries: total number of entries, where they do not follow the order of the elements.
    """

    suffix: str
    dtype: torch.dtype
    span: int = 1
    shared: int = 1
    entries: int | None = None

    @property
    def per_element(self) -> bool:
        """Whether the stored tensor has the moment's shape."""
        return self.span == 1 and self.entries is None

    def key(self, moment: str) -> str:
        """The key in ``optimizer.state[p]``, e.g. ``exp_avg_codes``."""
        return f"{moment}_{self.suffix}" if self.suffix else moment

    def length(self, numel: int) -> int:
        """Number of entries for ``numel`` elements; the last ones may cover fewer than ``span``."""
        return -(-numel // self.span) * self.shared if self.entries is None else self.entries

    def part(self, start: int, stop: int) -> slice:
        """The entries of elements ``start`` to ``stop``; ``start`` is a multiple of ``span``."""
        if self.entries is not None:
            return slice(self.entries)
        return slice(self.length(start), self.length(stop))

    def nbytes(self, numel: int) -> int:
        """Exact bytes stored for a moment of ``numel`` elements."""
        return self.length(numel) * self.dtype.itemsize

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The stored shape for a moment of ``shape``.

        Where ``span`` divides the last dimension, the leading dimensions are kept, so that the
        component can be sharded along them with the parameter. Otherwise it is one-dimensional.
        """
        shape = tuple(shape)
        if self.per_element:
            return shape
        if self.entries is None and shape and shape[-1] and shape[-1] % self.span == 0:
            return (*shape[:-1], self.length(shape[-1]))
        numel = 1
        for size in shape:
            numel *= size
        return (self.length(numel),)


@dataclass(frozen=True)
class DeviceFunctions:
    """The device functions of a format, which load and store one tile in a kernel.

    ``load(first, second, offsets, rows, left, MARKED, OPTIONS)`` returns the decoded tile, float32
    [pieces, elements], and an int32 for each block, negative where the block is marked
    (``formats.block``). It decodes marked blocks correctly only with MARKED.
    ``store(first, second, x, random, offsets, rows, left, OPTIONS)`` encodes the tile ``x``.

    ``first`` and ``second`` point to the components' entries for the tile's first element; with one
    component ``second`` is unused. From that element, ``offsets`` [pieces, elements] number the
    elements, ``rows`` number the blocks, and ``left`` is the number of elements up to the tensor's
    end. ``random`` holds 16 random bits per element, int32. With n blocks, pieces r, r + n,
    r + 2 n ... make up block r: ``spread`` brings one number per block to the pieces, and
    ``row_amax`` finds the largest magnitude of each block.

    Attributes:
        load: as above.
        store: as above.
        options: the value of OPTIONS.
        marks: whether blocks can be marked.
        returns: whether ``store`` returns the tile as it decodes.
    """

    load: Any
    store: Any
    options: int = 0
    marks: bool = False
    returns: bool = False


@dataclass(frozen=True)
class Format(PlainFields, ABC):
    """How a moment is stored.

    A format is a frozen dataclass whose fields are its options. Equal formats store equal bytes.
    Components of all-zero bytes decode to zeros.

    Args:
        min_elements: tensors with fewer elements keep the moment in float32; 0 encodes all.
    """

    name: ClassVar[str]
    min_elements: int = field(default=0, kw_only=True)

    @property
    @abstractmethod
    def components(self) -> tuple[Component, ...]:
        """The tensors that store a moment, in the order that ``encode`` and ``decode`` take."""

    @property
    def keeps_positive(self) -> bool:
        """Whether positive numbers never decode to zero; a second moment requires it."""
        return True

    @property
    def keeps_sign(self) -> bool:
        """Whether negative numbers can be stored; a first moment requires it."""
        return True

    @property
    def in_update_units(self) -> bool:
        """Whether a first moment is stored divided by the root of its second moment."""
        return False

    @property
    def uses_random(self) -> bool:
        """Whether ``encode`` needs random numbers."""
        return False

    @property
    def in_pairs(self) -> bool:
        """Whether step 2k + 1 is rounded with the mirrored random numbers of step 2k."""
        return False

    @property
    def marks(self) -> bool:
        """Whether a negative scale marks a block; otherwise scales are at least 0."""
        return False

    @property
    def device_functions(self) -> DeviceFunctions | None:
        """The format's device functions; None if only the torch code exists."""
        return None

    @property
    def whole(self) -> bool:
        """Whether ``encode`` and ``decode`` need the whole moment and not only a slice."""
        return False

    def for_shape(self, shape: Sequence[int], order: Sequence[int]) -> Format:
        """The format for a moment of ``shape``; the format itself unless it depends on the shape.

        Args:
            shape: shape of the parameter.
            order: its dimensions from the slowest to the fastest in storage, which is the order
                of the elements.
        """
        return self

    @abstractmethod
    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        """Encode ``x`` into ``parts``.

        Args:
            x: the moment or a slice of it that starts at a multiple of ``span``; flat, float32.
            parts: the matching flat slices of the components; overwritten.
            draw: random numbers of this slice; required where ``uses_random``.
        """

    @abstractmethod
    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Decode ``parts``: flat, float32, and for fp32 a view of the component.

        Where codes share bytes, the padding of the last bytes is decoded as well and comes last;
        the caller cuts it off.
        """

    @property
    def span(self) -> int:
        """Elements per block; slices of a moment start at multiples of it."""
        return max(component.span for component in self.components)

    def nbytes(self, numel: int) -> int:
        """Exact bytes stored for a moment of ``numel`` elements."""
        if numel < self.min_elements:
            return 4 * numel
        return sum(component.nbytes(numel) for component in self.components)

    @classmethod
    def options(cls) -> list[Field[Any]]:
        """The dataclass fields: the format's own, then those that every format has."""
        return sorted(fields(cls), key=lambda f: bool(f.kw_only))

    @property
    def spec(self) -> str:
        """The format as text, e.g. ``dynamic8(block_size=256)``; ``parse_format`` reads it."""
        options = [
            f"{f.name}={getattr(self, f.name)}"
            for f in self.options()
            if f.default is MISSING or getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name

    def require_draw(self, draw: Draw | None) -> Draw:
        """``draw``; raises ValueError if it is None."""
        if draw is None:
            raise ValueError(f"draw=None: {self.spec} rounds stochastically and needs a Draw")
        return draw


def rounded(value: float) -> float:
    """``value`` rounded to float32."""
    (number,) = struct.unpack("<f", struct.pack("<f", value))
    return float(number)


def float32_bits(value: float) -> int:
    """The bits of ``value`` as a float32, read as an int32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)
