"""Rank-1 normalization: scales per row and column, or per index of every dimension.

For each dimension and index, the largest magnitude of the elements with that index is stored. An
element's scale is the smallest of its maxima: for a matrix, the smaller of its row's and its
column's maximum (Li et al., arXiv:2309.01507). An outlier does not coarsen elements that are in
other rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from optstate_codecs.formats.base import Component

__all__ = ["Axes"]


@dataclass(frozen=True)
class Axes:
    """The dimensions of a tensor that are longer than one, from the slowest in storage.

    A dimension of length one has the maximum of the whole tensor, which is never the smallest.

    Attributes:
        dims: indices of these dimensions.
        sizes: their lengths.
    """

    dims: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], order: Sequence[int]) -> Axes:
        """The axes of a tensor of ``shape`` whose elements are stored in ``order``."""
        dims = tuple(d for d in order if shape[d] != 1)
        return cls(dims, tuple(shape[d] for d in dims))

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return prod(self.sizes)

    @property
    def components(self) -> tuple[Component, ...]:
        """The stored maxima: ``scale0`` has one for each index of dimension 0."""
        pairs = zip(self.dims, self.sizes, strict=True)
        return tuple(Component(f"scale{d}", torch.float32, entries=size) for d, size in pairs)

    def maxima(self, x: Tensor) -> list[Tensor]:
        """The largest magnitude of ``x`` (flat, finite) for each index of each axis."""
        magnitude, axes = x.abs().view(self.sizes), range(len(self.sizes))
        return [magnitude.amax([other for other in axes if other != k]) for k in axes]

    def scale(self, maxima: Sequence[Tensor]) -> Tensor:
        """The scale of each element, flat: the smallest of its maxima."""
        last = len(self.sizes) - 1
        per_axis = [m.view(-1, *[1] * (last - k)) for k, m in enumerate(maxima)]
        return reduce(torch.minimum, per_axis).view(-1)
