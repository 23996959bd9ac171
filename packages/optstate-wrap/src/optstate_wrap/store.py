"""Where records live between steps, as something to load from and to store to.

A store takes the records of a whole chunk at once, so that it can move them as one slab.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.engine import Session
from optstate_codecs.places import CHUNK_BYTES, HostPlace, Stream
from optstate_codecs.places.pinned import empty_pinned
from optstate_wrap.plan import Piece
from optstate_wrap.record import Coded, Record
from optstate_wrap.scratch import movable

__all__ = ["DeviceStore", "Held", "HostStore", "Store", "make_store"]

Records = list[list[Record]]


class Store(ABC):
    """Records by parameter, a list of one for each part.

    ``load`` brings the records of a chunk to the parameters' device; ``save`` makes new ones what
    is stored, all at once: if it raises, what was stored before still is.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self._kept: dict[Tensor, list[Record]] = {}
        #: has all that a session still stores where the records show it
        self.settle: Callable[[], None] | None = None

    def __contains__(self, param: object) -> bool:
        return param in self._kept

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def kept(self, param: Tensor) -> list[Record]:
        """What is stored of a parameter, where it is stored."""
        if self.settle is not None:
            self.settle()
        return self._kept[param]

    def peek(self, param: Tensor) -> list[Record]:
        """The same, of whose tensors nobody may read the numbers: they may be under way."""
        return self._kept[param]

    def load(self, chunk: Sequence[Piece]) -> list[Record | None]:
        """The records of a chunk beside their parameters, None where there is none yet."""
        return [
            self.fetched(self.kept(piece.param)[piece.part], piece.param)
            if piece.param in self
            # what has not been stepped
            else None
            for piece in chunk
        ]

    def save(self, params: Sequence[Tensor], records: Records) -> None:
        """Store the records of whole parameters."""
        self._kept.update(zip(params, self.placed(records), strict=True))

    def replace(self, kept: dict[Tensor, list[Record]]) -> None:
        """Keep these, already ``placed``, and nothing else."""
        self._kept = kept

    def drop(self, param: Tensor) -> None:
        """Forget a parameter's records."""
        del self._kept[param]

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def session(self) -> Session | Stream:
        """What steps units whose state is kept here."""
        return Session("auto")

    def __getstate__(self) -> dict[str, Any]:
        # a copy has a session of its own
        return {**self.__dict__, "settle": None}

    @abstractmethod
    def placed(self, records: Records) -> Records:
        """The records as this store keeps them."""

    @abstractmethod
    def fetched(self, record: Record, param: Tensor) -> Record:
        """A kept record, beside its parameter."""


class DeviceStore(Store):
    """Records stay where the optimizer made them: nothing is moved."""

    name = "device"

    def placed(self, records: Records) -> Records:
        return records

    def fetched(self, record: Record, param: Tensor) -> Record:
        return record


class HostStore(Store):
    """Records in host memory, each chunk's tensors side by side in one slab.

    Args:
        pin_memory: page-locked slabs, for copies at the full speed of the bus; None: where the
            parameters are on a GPU.
        chunk_bytes: of what the codecs' engine steps, what moves at a time.
        resident_bytes: of that, what stays on the device.
    """

    name = "host"

    def __init__(
        self,
        pin_memory: bool | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        resident_bytes: int = 0,
    ) -> None:
        super().__init__()
        self.pin_memory = pin_memory
        self.chunk_bytes = chunk_bytes
        self.resident_bytes = resident_bytes

    def session(self) -> Stream:
        place = HostPlace(self.pin_memory)
        return Stream("auto", place, self.chunk_bytes, self.resident_bytes)

    def placed(self, records: Records) -> Records:
        found: list[Tensor] = []
        for parts in records:
            for record in parts:
                found.extend(_movable(record))
        pin = self.pin_memory
        if pin is None:
            pin = any(tensor.device.type == "cuda" for tensor in found)
        offsets, size = [], 0
        for tensor in found:
            offsets.append(size)
            # views of any dtype begin at multiples of 16 bytes
            size += -(-tensor.nbytes // 16) * 16
        slab = empty_pinned(size, pin)
        moved = {}
        for tensor, offset in zip(found, offsets, strict=True):
            inside = slab[offset : offset + tensor.nbytes].view(tensor.dtype)
            # in the order of its storage, so that it comes back with the strides that it had
            moved[id(tensor)] = inside.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        return [[_put(record, moved) for record in parts] for parts in records]

    def fetched(self, record: Record, param: Tensor) -> Record:
        # what is not coded comes in copies, which a step may change
        return {
            key: value.to(param.device)
            if isinstance(value, Coded)
            else value.back()
            if isinstance(value, Held)
            else value
            for key, value in record.items()
        }


@dataclass(frozen=True)
class Held:
    """A tensor that is kept elsewhere than where it is used."""

    tensor: Tensor
    device: torch.device

    def back(self) -> Tensor:
        """A copy of the tensor where it is used."""
        return self.tensor.to(self.device, copy=True)


def _movable(record: Record) -> Iterator[Tensor]:
    """The tensors of a record that are worth a place in a slab: not 0-d ones, nor sharded."""
    for value in record.values():
        if isinstance(value, Coded):
            yield from value.parts
        elif isinstance(value, Tensor) and value.dim() > 0 and movable(value):
            yield value


def _put(record: Record, moved: dict[int, Tensor]) -> Record:
    new: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Coded):
            new[key] = replace(value, parts=tuple(moved[id(part)] for part in value.parts))
        elif id(value) in moved:
            new[key] = Held(moved[id(value)], value.device)
        else:
            new[key] = value
    return new


STORES = ("device", "host")


def make_store(where: str | Store, pin_memory: bool | None) -> Store:
    """The store of that name, or the one that is given."""
    if isinstance(where, Store):
        return where
    checks.one_of("store", where, STORES)
    return HostStore(pin_memory) if where == "host" else DeviceStore()
