"""Rank-1 normalisation: an element's scale from one number for each index of each dimension.

The scale is the least, over the dimensions, of the largest magnitude among all elements that share
the element's index in it: for a matrix, the smaller of its row's and its column's maximum (Li et
al., arXiv:2309.01507, on rank-1 normalization). So an outlier coarsens no element in other rows and
columns.
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

    The others are left out: the maximum over a whole tensor is never the least.

    Attributes:
        dims: their numbers.
        sizes: their lengths.
    """

    dims: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], order: Sequence[int]) -> Axes:
        """The axes of a ``shape`` whose elements come in ``order``."""
        dims = tuple(d for d in order if shape[d] != 1)
        return cls(dims, tuple(shape[d] for d in dims))

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return prod(self.sizes)

    @property
    def components(self) -> tuple[Component, ...]:
        """The maxima as stored: ``scale0`` has one for each index of dimension 0."""
        pairs = zip(self.dims, self.sizes, strict=True)
        return tuple(Component(f"scale{d}", torch.float32, entries=size) for d, size in pairs)

    def maxima(self, x: Tensor) -> list[Tensor]:
        """The largest magnitudes of flat ``x``, which is finite, along each axis."""
        whole, places = x.abs().view(self.sizes), range(len(self.sizes))
        return [whole.amax([other for other in places if other != k]) for k in places]

    def scale(self, maxima: Sequence[Tensor]) -> Tensor:
        """Each element's least maximum, flat."""
        last = len(self.sizes) - 1
        spread = [m.view(-1, *[1] * (last - k)) for k, m in enumerate(maxima)]
        return reduce(torch.minimum, spread).view(-1)
