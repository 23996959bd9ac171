"""Parameters split into chunks, and chunks gathered into batches that are stepped together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs.offloading.slabs import BLOCK_ALIGNMENT
from optstate_codecs.state.layout import inverse_order, is_dense, storage_order

__all__ = ["Layout", "ParamChunk", "default_chunk_size", "make_batches", "split_params"]

# Elements in a batch. On a GPU, large enough to hide the cost of launches. On a CPU, so small
# that parameter, gradient, state and the copies that undo a step stay in its last cache (14 MiB for
# Adam), so that they are read from memory once. Batches of 2^21 take up to twice as long.
CHUNK_CUDA = 1 << 24
CHUNK_CPU = 1 << 19
# With offloaded state, the GPU holds three batches at a time.
CHUNK_OFFLOADED = 1 << 23
MIN_CHUNK_SIZE = 256


@dataclass(frozen=True)
class Layout:
    """The shape of a parameter, and the order of its dimensions in memory, slowest first."""

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, param: Tensor) -> Layout:
        """The current layout of a parameter."""
        return cls(tuple(param.shape), storage_order(param))

    def unflatten(self, flat: Tensor) -> Tensor:
        """A view of all elements in storage order, as a tensor of this shape and order."""
        ordered = [self.shape[d] for d in self.order]
        return flat.view(ordered).permute(inverse_order(self.order))


@dataclass(frozen=True, eq=False)
class ParamChunk:
    """A whole parameter, or its elements ``start`` to ``stop`` in storage order.

    Attributes:
        param: the whole parameter.
        number: index of the parameter in the optimizer, counted over all groups.
        group: index of its param group.
        part: index of the chunk among the chunks of its parameter.
        parts: number of chunks that the parameter is split into.
        times: how often its group lists the parameter; the optimizer steps it that often.
    """

    param: Tensor
    number: int
    group: int
    start: int
    stop: int
    part: int = 0
    parts: int = 1
    times: int = 1

    @property
    def last(self) -> bool:
        """Whether this is the last chunk of its parameter."""
        return self.part == self.parts - 1

    def stand_in(self) -> Tensor:
        """The tensor that the inner optimizer steps: the parameter, or a view of the slice."""
        if self.parts == 1:
            return self.param
        view = self._view(self.param.detach()).requires_grad_(self.param.requires_grad)
        grad = self.param.grad
        if grad is not None:
            if grad.layout is not torch.strided:
                raise TypeError(
                    f"gradient of parameter {self.number}: layout {grad.layout}, must be dense, or "
                    f"chunk_size at least {self.param.numel()} so that the tensor is not split"
                )
            view.grad = self._view(grad)
        return view

    def gradient(self) -> Tensor:
        """The gradient of the chunk, which must exist."""
        grad = self.param.grad
        assert grad is not None
        return grad if self.parts == 1 else self._view(grad)

    def data(self) -> Tensor:
        """The elements of the parameter that a step of this chunk writes."""
        data = self.param.detach()
        return data if self.parts == 1 else self._view(data)

    def like(self) -> Tensor:
        """A tensor with the shape and memory order of the chunk; its values are undefined."""
        if self.parts == 1:
            return self.param.detach()
        # the parameter may have another layout now than when it was split
        return torch.empty(self.stop - self.start, dtype=self.param.dtype, device="meta")

    def _view(self, tensor: Tensor) -> Tensor:
        ordered = tensor.permute(storage_order(self.param))
        return ordered.reshape(-1)[self.start : self.stop]


def default_chunk_size(device: torch.device, offloaded: bool) -> int:
    """Elements in a batch by default, for state on ``device`` or ``offloaded`` to the host."""
    return CHUNK_CPU if device.type == "cpu" else CHUNK_OFFLOADED if offloaded else CHUNK_CUDA


def split_params(
    groups: Sequence[Mapping[str, Any]], size: int, splittable: bool
) -> list[ParamChunk]:
    """The chunks of all parameters in ``groups``, in order.

    A parameter that a group lists several times, which torch warns about, is returned once.

    Args:
        groups: an optimizer's param groups.
        size: elements in a chunk at most. Chunks begin at multiples of ``size`` rounded down to a
            multiple of 256, where a processor's vectors begin, or of 8,192 if it is at least that.
        splittable: whether stepping a slice of a parameter gives the result of stepping the whole.
    """
    alignment = max(a for a in (1, MIN_CHUNK_SIZE, BLOCK_ALIGNMENT) if a <= max(size, 1))
    size = size // alignment * alignment
    chunks = []
    number = 0
    for index, group in enumerate(groups):
        times = _times(group["params"])
        for param in group["params"]:
            count = 1 if times is None else times.pop(id(param), 0)
            if count:
                numel = param.numel()
                split = splittable and numel > size and _divisible(param)
                starts = range(0, numel, size) if split else range(1)
                for part, start in enumerate(starts):
                    stop = min(start + size, numel) if split else numel
                    chunk = ParamChunk(param, number, index, start, stop, part, len(starts), count)
                    chunks.append(chunk)
            number += 1
    return chunks


def _times(params: Sequence[Tensor]) -> Counter[int] | None:
    """How often each parameter is listed, by ``id``; None if all are listed once."""
    numbers = list(map(id, params))
    return Counter(numbers) if len(set(numbers)) < len(numbers) else None


def _divisible(param: Tensor) -> bool:
    return type(param) in (Tensor, Parameter) and param.layout is torch.strided and is_dense(param)


def make_batches(chunks: Iterable[ParamChunk], size: int) -> list[list[ParamChunk]]:
    """Consecutive chunks in batches of at most ``size`` elements, or of one larger chunk."""
    batches: list[list[ParamChunk]] = []
    filled = 0
    for chunk in chunks:
        numel = chunk.stop - chunk.start
        if not batches or filled + numel > size:
            batches.append([])
            filled = 0
        batches[-1].append(chunk)
        filled += numel
    return batches
