"""Which parameters, and which parts of large ones, are stepped together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs.state.layout import is_dense, storage_order

__all__ = ["Layout", "ParamChunk", "default_chunk_size", "make_batches", "split_params"]

# parameters in a chunk: on a GPU so many that launches do not count; on a CPU so few that
# what a step is undone from fits into its cache
CHUNK_CUDA = 1 << 24
CHUNK_CPU = 1 << 21
# of state that comes from the host, three chunks are on the GPU
CHUNK_AWAY = 1 << 23
LEAST = 256
# parts begin where blocks of any size begin
BORDER = 8192


@dataclass(frozen=True)
class Layout:
    """The shape of a parameter, and the order of its dimensions in memory, slowest first."""

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, param: Tensor) -> Layout:
        """The layout that a parameter has now."""
        return cls(tuple(param.shape), storage_order(param))


@dataclass(frozen=True, eq=False)
class ParamChunk:
    """A parameter, or elements ``start`` to ``stop`` of one in its storage order.

    Attributes:
        param: the whole parameter.
        number: its place in the optimizer, counted over all groups.
        group: the number of its param group.
        part: its place among the parts of the parameter.
        parts: how many parts the parameter has.
        times: how often its group has the parameter, and the optimizer so steps it.
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
        """Whether the parameter's step is complete with it."""
        return self.part == self.parts - 1

    def stand_in(self) -> Tensor:
        """What the inner optimizer is given: the parameter, or a parameter that views the part."""
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
        """The gradient of the chunk, which has one."""
        grad = self.param.grad
        assert grad is not None
        return grad if self.parts == 1 else self._view(grad)

    def data(self) -> Tensor:
        """The elements that the chunk's step writes."""
        data = self.param.detach()
        return data if self.parts == 1 else self._view(data)

    def like(self) -> Tensor:
        """A tensor of the chunk's shape, in its order, whose numbers nobody may read."""
        if self.parts == 1:
            return self.param.detach()
        # of the parameter as it was cut, which it need not be any more
        return torch.empty(self.stop - self.start, dtype=self.param.dtype, device="meta")

    def _view(self, tensor: Tensor) -> Tensor:
        ordered = tensor.permute(storage_order(self.param))
        return ordered.reshape(-1)[self.start : self.stop]


def default_chunk_size(device: torch.device, away: bool) -> int:
    """Parameters in a chunk where nobody says, with state beside them or ``away``."""
    return CHUNK_CPU if device.type == "cpu" else CHUNK_AWAY if away else CHUNK_CUDA


def split_params(
    groups: Sequence[Mapping[str, Any]], size: int, splittable: bool
) -> list[ParamChunk]:
    """Every parameter of ``groups``, in order, cut where it is larger than ``size``.

    One that a group has several times, which torch warns of, is there once.

    Args:
        groups: an optimizer's param groups.
        size: elements; parts begin at multiples of it, rounded down to a multiple of 256, where a
            processor's vectors begin, or of 8,192 where it is larger than that.
        splittable: whether the optimizer steps a part as it would step it within the whole.
    """
    border = BORDER if size >= BORDER else LEAST if size >= LEAST else 1
    size = size // border * border
    found = []
    number = 0
    for index, group in enumerate(groups):
        times = _times(group["params"])
        for param in group["params"]:
            count = 1 if times is None else times.pop(id(param), 0)
            if count:
                numel = param.numel()
                cut = splittable and numel > size and _divisible(param)
                starts = range(0, numel, size) if cut else range(1)
                for part, start in enumerate(starts):
                    stop = min(start + size, numel) if cut else numel
                    chunk = ParamChunk(param, number, index, start, stop, part, len(starts), count)
                    found.append(chunk)
            number += 1
    return found


def _times(params: Sequence[Tensor]) -> Counter[int] | None:
    """How often each parameter is there, by identity; None where each is there once."""
    numbers = list(map(id, params))
    return Counter(numbers) if len(set(numbers)) < len(numbers) else None


def _divisible(param: Tensor) -> bool:
    return type(param) in (Tensor, Parameter) and param.layout is torch.strided and is_dense(param)


def make_batches(of: Iterable[ParamChunk], size: int) -> list[list[ParamChunk]]:
    """Neighbouring chunks in batches of at most ``size`` elements, or of one chunk."""
    batches: list[list[ParamChunk]] = []
    filled = 0
    for chunk in of:
        length = chunk.stop - chunk.start
        if not batches or filled + length > size:
            batches.append([])
            filled = 0
        batches[-1].append(chunk)
        filled += length
    return batches
