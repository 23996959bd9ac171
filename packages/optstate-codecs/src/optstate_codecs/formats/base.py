"""The contract every format keeps: which tensors hold a moment, and how to encode and decode it."""

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
    """One of the tensors that a moment is stored as.

    Attributes:
        suffix: appended to the moment's name to give the state key; "" keeps the name itself.
        dtype: of the stored tensor.
        span: consecutive elements of the moment that share entries (1: one entry each).
        shared: how many they share; more than 1 where codes lie across the borders of bytes.
        entries: how many, of a component whose entries do not follow the elements in a row.
    """

    suffix: str
    dtype: torch.dtype
    span: int = 1
    shared: int = 1
    entries: int | None = None

    @property
    def per_element(self) -> bool:
        """Whether it has the moment's shape."""
        return self.span == 1 and self.entries is None

    def key(self, moment: str) -> str:
        """The key in ``optimizer.state[p]``, e.g. ``exp_avg_codes``."""
        return f"{moment}_{self.suffix}" if self.suffix else moment

    def length(self, numel: int) -> int:
        """Entries for a moment of ``numel`` elements; the last ones may cover fewer."""
        return -(-numel // self.span) * self.shared if self.entries is None else self.entries

    def part(self, start: int, stop: int) -> slice:
        """Which entries elements ``start`` to ``stop`` have; ``start`` is at a border."""
        if self.entries is not None:
            return slice(self.entries)
        return slice(self.length(start), self.length(stop))

    def nbytes(self, numel: int) -> int:
        """Exact bytes stored for a moment of ``numel`` elements."""
        return self.length(numel) * self.dtype.itemsize

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The stored shape for a moment of ``shape``.

        Blocks that fit into rows keep the leading dimensions, so that the component can be cut
        along them together with the parameter; otherwise it is one flat row of blocks.
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
    """A format inside a kernel: how a tile of it is loaded and stored.

    ``load(first, second, offsets, rows, left, MARKED, OPTIONS)`` returns float32 [pieces,
    elements], and an int32 for each block, below zero where it is marked (``formats.blocks``). Only
    if MARKED, which it is wherever a block of the tile is, does it mind marks; ``marks`` says
    whether blocks can be. ``store(first, second, x, random, offsets, rows, left, OPTIONS)`` keeps a
    tile, and where ``returns`` says so returns it as it is kept.

    ``first`` and ``second`` point at the components' entries for the tile's first element
    (``second`` is unused where there is one component); ``offsets`` [pieces, elements] count
    elements and ``rows`` blocks from there, ``left`` says how many elements there are; ``random``
    holds 16 random bits an element, int32. Pieces r, r + rows, r + 2 rows ... make block r:
    ``device.spread`` brings a number a block to its elements, ``device.row_amax`` finds one.
    """

    load: Any
    store: Any
    options: int = 0
    marks: bool = False
    returns: bool = False


@dataclass(frozen=True)
class Format(PlainFields, ABC):
    """How a moment is stored.

    A format is a small frozen dataclass: its fields are its options, and two equal formats store
    equal bytes. Components of all-zero bytes decode to a moment of zeros.

    Args:
        min_elements: tensors with fewer keep the moment in float32; 0 codes all of them.
    """

    name: ClassVar[str]
    min_elements: int = field(default=0, kw_only=True)

    @property
    @abstractmethod
    def components(self) -> tuple[Component, ...]:
        """The tensors a moment is stored as, in the order ``encode`` and ``decode`` take them."""

    @property
    def keeps_positive(self) -> bool:
        """Whether a positive number never decodes to zero, as a second moment needs."""
        return True

    @property
    def keeps_sign(self) -> bool:
        """Whether it holds negative numbers, as a first moment needs."""
        return True

    @property
    def in_update_units(self) -> bool:
        """Whether a first moment is held divided by the root of its second moment."""
        return False

    @property
    def uses_random(self) -> bool:
        """Whether ``encode`` needs a draw."""
        return False

    @property
    def in_pairs(self) -> bool:
        """Whether steps 2k and 2k + 1 are rounded by mirrored random numbers."""
        return False

    @property
    def device_functions(self) -> DeviceFunctions | None:
        """The format's device functions, or None where only the torch reference exists."""
        return None

    @property
    def whole(self) -> bool:
        """Whether ``encode`` and ``decode`` need all of a moment at once, instead of a slice."""
        return False

    def for_shape(self, shape: Sequence[int], order: Sequence[int]) -> Format:
        """The format as it stores a moment of ``shape``: itself, unless the shape decides.

        Args:
            shape: of the parameter.
            order: its dimensions from the slowest to the fastest in storage; elements come in it.
        """
        return self

    @abstractmethod
    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        """Store ``x`` into ``parts``.

        Args:
            x: the moment or a slice of it, flat, float32, starting at a block's border.
            parts: the matching flat slices of the components; overwritten.
            draw: random numbers of this slice; needed where ``uses_random``.
        """

    @abstractmethod
    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """The moment that ``parts`` hold, flat and float32 (a view where the format is fp32).

        Where codes share bytes, what fills up the last bytes comes last and is to be cut off.
        """

    @property
    def span(self) -> int:
        """Elements per block: slices of a moment start at multiples of it."""
        return max(component.span for component in self.components)

    def nbytes(self, numel: int) -> int:
        """Exact bytes stored for a moment of ``numel`` elements."""
        if numel < self.min_elements:
            return 4 * numel
        return sum(component.nbytes(numel) for component in self.components)

    @classmethod
    def options(cls) -> list[Field[Any]]:
        """The fields, with what every format has after the format's own."""
        return sorted(fields(cls), key=lambda f: bool(f.kw_only))

    @property
    def spec(self) -> str:
        """The format as text, e.g. ``dynamic8(block_size=256)``; see ``parse_format``."""
        options = [
            f"{f.name}={getattr(self, f.name)}"
            for f in self.options()
            if f.default is MISSING or getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name

    def require_draw(self, draw: Draw | None) -> Draw:
        """``draw``, which must not be None."""
        if draw is None:
            raise ValueError(f"draw=None: {self.spec} rounds stochastically and needs a Draw")
        return draw


def rounded(value: float) -> float:
    """``value`` as float32 holds it."""
    (number,) = struct.unpack("<f", struct.pack("<f", value))
    return float(number)


def float32_bits(value: float) -> int:
    """The bits of ``value`` as a float32, as an int32 has them."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)
