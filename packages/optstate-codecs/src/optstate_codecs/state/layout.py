"""Flat views: the order in which the elements of a tensor are stepped and stored.

State follows the parameter's storage order, as ``torch.optim``'s does with
``memory_format=torch.preserve_format``, so that dense tensors of any layout are read sequentially.
A tensor that is not dense in that order is gathered and scattered slice by slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import numpy
import torch
from torch import Tensor

from optstate_codecs.formats import FP32, Component, Format

__all__ = [
    "Declaration",
    "FlatState",
    "FlatView",
    "bound",
    "empty_state",
    "inverse_order",
    "is_dense",
    "same_order",
    "slices",
    "storage_order",
    "stored_formats",
    "view_bytes_as",
]

# a slice's temporaries fit a core's cache; on other devices launches cost more than memory does
SLICE_CPU = 1 << 16
SLICE_DEVICE = 1 << 22


def slices(tensor: Tensor, formats: Iterable[Format] = ()) -> Iterator[tuple[int, int]]:
    """Start and stop of each slice of ``tensor``; starts are multiples of every block size.

    One slice where any of ``formats`` needs the whole tensor.
    """
    numel = tensor.numel()
    size = SLICE_CPU if tensor.device.type == "cpu" else SLICE_DEVICE
    if any(format.whole for format in formats):
        size = max(numel, 1)
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


def storage_order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions of ``tensor`` from the slowest to the fastest in storage."""
    strides = tensor.stride()
    return tuple(
        sorted(range(tensor.dim()), key=lambda d: (-strides[d], tensor.shape[d] == 1, d))
        if not tensor.is_contiguous()
        else range(tensor.dim())
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether a strided tensor's elements follow each other in memory, in its storage order."""
    # contiguous ones first: ``permute`` takes more of the host's time than a launch leaves
    return tensor.is_contiguous() or tensor.permute(storage_order(tensor)).is_contiguous()


def bound(formats: Mapping[str, Format], tensor: Tensor) -> dict[str, Format]:
    """The formats as they store moments of ``tensor``'s size and shape in its storage order."""
    shape, order = tensor.shape, storage_order(tensor)
    stored = stored_formats(formats, shape.numel())
    return {name: format.for_shape(shape, order) for name, format in stored.items()}


def stored_formats(formats: Mapping[str, Format], numel: int) -> dict[str, Format]:
    """The formats that store moments of ``numel`` elements, for tensors of any size."""
    return {name: FP32() if numel < f.min_elements else _coded(f) for name, f in formats.items()}


@lru_cache(maxsize=1024)
def _coded(format: Format) -> Format:
    """The format without ``min_elements``, which differs between otherwise equal formats."""
    return replace(format, min_elements=0)


class FlatView:
    """A tensor as a flat sequence of elements in a given dimension order, in slices."""

    def __init__(self, tensor: Tensor, order: Sequence[int]) -> None:
        self._ordered = tensor.permute(tuple(order))
        self._dense = self._ordered.view(-1) if self._ordered.is_contiguous() else None

    def read(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop``: a view where dense, otherwise a copy."""
        if self._dense is not None:
            return self._dense[start:stop]
        return torch.take(self._ordered, self._indices(start, stop))

    def write(self, start: int, stop: int, values: Tensor) -> None:
        """Store ``values`` (of the tensor's dtype) as elements ``start`` to ``stop``."""
        if self._dense is None:
            self._ordered.put_(self._indices(start, stop), values)
        elif values.data_ptr() != self._dense[start:stop].data_ptr():
            self._dense[start:stop].copy_(values)

    def _indices(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, dtype=torch.int64, device=self._ordered.device)


class Declaration(Protocol):
    """A format or a parameter write: it declares the tensors that it stores."""

    @property
    def components(self) -> tuple[Component, ...]:
        """The tensors, in the order in which the format or write takes them."""


class FlatState:
    """The components of a parameter's state, cut into the slices of a step.

    Args:
        state: components by state key.
        stored: the format of each moment, and the write of the parameter if needed.
        order: the dimension order in which the components lie in memory.
    """

    def __init__(
        self, state: Mapping[str, Tensor], stored: Mapping[str, Declaration], order: Sequence[int]
    ) -> None:
        self._flat = {
            name: [(_flatten(state[c.key(name)], c, order), c) for c in declared.components]
            for name, declared in stored.items()
        }

    def slice(self, start: int, stop: int) -> dict[str, list[Tensor]]:
        """Views of the components that store elements ``start`` to ``stop`` of each moment."""
        return {
            name: [flat[component.part(start, stop)] for flat, component in parts]
            for name, parts in self._flat.items()
        }


def _flatten(state: Tensor, component: Component, order: Sequence[int]) -> Tensor:
    return state.permute(tuple(order)).view(-1) if component.per_element else state.view(-1)


def inverse_order(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes ``order``."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


@torch.inference_mode(False)
def empty_state(param: Tensor, component: Component, device: torch.device | None = None) -> Tensor:
    """A zeroed component for a moment of ``param``, in the parameter's storage order.

    It is on the parameter's device, or on ``device``; if that is the CPU, its pages take no memory
    until they are written. It is never an inference tensor, so steps in any mode may change it.
    """
    if not component.per_element:
        return _zeros(component.shape(param.shape), component.dtype, param, device)
    order = storage_order(param)
    ordered = [param.shape[d] for d in order]
    return _zeros(ordered, component.dtype, param, device).permute(inverse_order(order))


def _zeros(
    shape: Sequence[int], dtype: torch.dtype, like: Tensor, device: torch.device | None
) -> Tensor:
    numel = torch.Size(shape).numel()
    if device is None or device.type != "cpu" or numel == 0:
        return torch.zeros(shape, dtype=dtype, device=device or like.device)
    # torch.zeros would write the pages
    room = torch.from_numpy(numpy.zeros(numel * dtype.itemsize, dtype=numpy.uint8))
    return room.view(dtype).view(torch.Size(shape))


def view_bytes_as(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """A view of bytes from ``start`` on as a dense tensor of another's dtype, shape and strides.

    Args:
        memory: uint8; ``start`` must be aligned for the dtype.
        start: the first byte.
        like: dense; on any device.
    """
    inside = memory[start : start + like.nbytes].view(like.dtype)
    return inside.as_strided(like.shape, like.stride())


def same_order(state: Tensor, component: Component, param: Tensor) -> bool:
    """Whether ``state`` has the layout in memory that ``empty_state`` makes for ``param``."""
    if not component.per_element:
        return state.is_contiguous()
    return state.permute(storage_order(param)).is_contiguous()
