"""Stores: where records live between steps. A store loads and stores the records of a batch.

A store gets the records of a whole batch at once, so that it can move them as one slab of memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor

from optstate_codecs.engine import ResidentExecutor
from optstate_codecs.offloading import StreamingExecutor
from optstate_wrap.state.param_chunks import Layout, ParamChunk
from optstate_wrap.state.record import Record

__all__ = ["DeviceStore", "Records", "Store"]

Records = list[list[Record]]


class Store(ABC):
    """Records by parameter: a list with one record for each chunk.

    ``load`` brings the records of a batch to the parameters' device. ``save`` and ``swap`` replace
    stored records all at once: if they raise, the previous records are still stored.

    Attributes:
        entries: the records of each parameter, as they are stored.
        synchronize: makes the records show all state that an executor still holds; None: nothing
            to do.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.entries: dict[Tensor, list[Record]] = {}
        # of parameters in several chunks, the layout by which they were split
        self._layouts: dict[Tensor, Layout] = {}
        self.synchronize: Callable[[], None] | None = None

    def __contains__(self, param: object) -> bool:
        return param in self.entries

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def records(self, param: Tensor) -> list[Record]:
        """The records of a parameter as they are stored, with all pending writes done."""
        if self.synchronize is not None:
            self.synchronize()
        return self.entries[param]

    def latest_records(self, param: Tensor) -> Sequence[Record]:
        """The records of a parameter without waiting for pending writes; empty if it has none.

        Do not read the values of their tensors.
        """
        return self.entries.get(param, ())

    def load(self, batch: Sequence[ParamChunk]) -> list[Record | None]:
        """The records of a batch on their parameters' devices; None for chunks without state."""
        return [
            self.to_device(self.records(chunk.param)[chunk.part], chunk.param)
            if chunk.param in self
            else None
            for chunk in batch
        ]

    def save(self, param: Tensor, records: list[Record], layout: Layout | None = None) -> None:
        """Store the records of a whole parameter, split by ``layout``; None: its current layout."""
        self.swap([param], self.to_store([records]))
        self._set_layout(param, records, layout)

    def swap(self, params: Sequence[Tensor], records: Records) -> None:
        """Replace the records of whole parameters by records that ``to_store`` returned."""
        self.entries.update(zip(params, records, strict=True))
        for param, parts in zip(params, records, strict=True):
            self._set_layout(param, parts, None)

    def layout(self, param: Tensor) -> Layout:
        """The layout by which the records of a parameter were split."""
        return self._layouts.get(param) or Layout.of(param)

    def _set_layout(self, param: Tensor, parts: Sequence[Record], layout: Layout | None) -> None:
        if len(parts) > 1:
            self._layouts[param] = layout or Layout.of(param)
        elif self._layouts:
            self._layouts.pop(param, None)

    def discard(self, records: Sequence[Record]) -> None:  # noqa: B027
        """Release memory of records that ``to_store`` returned and that are no longer used."""

    def expect(self, batches: Sequence[Sequence[ParamChunk]]) -> None:  # noqa: B027
        """Prepare for a step that will ``load`` these batches in this order."""

    def end(self, whole: bool) -> None:  # noqa: B027
        """End the step that expected batches, or, if not ``whole``, one part of a step."""

    def is_staged(self, tensor: Tensor) -> bool:
        """Whether a loaded tensor is a copy of the stored one."""
        return False

    def wait(self) -> None:  # noqa: B027
        """Wait until all copies that ``to_store`` began are complete."""

    def replace(self, records: dict[Tensor, list[Record]]) -> None:
        """Store these records, which ``to_store`` returned, and remove all others."""
        self.entries = records
        self._layouts = {param: Layout.of(param) for param, r in records.items() if len(r) > 1}

    def drop(self, param: Tensor) -> None:
        """Remove the records of a parameter."""
        del self.entries[param]
        self._layouts.pop(param, None)

    def clear(self) -> None:
        """Remove all records."""
        self.entries.clear()
        self._layouts.clear()

    def make_executor(self) -> ResidentExecutor | StreamingExecutor:
        """A new executor of the codecs' engine for state in this store."""
        return ResidentExecutor("auto")

    def __getstate__(self) -> dict[str, Any]:
        # a copy makes its own executor
        if self.synchronize is not None:
            self.synchronize()
        return {**self.__dict__, "synchronize": None}

    @abstractmethod
    def to_store(self, records: Records) -> Records:
        """Move records to this store's memory, without replacing any that are stored."""

    @abstractmethod
    def to_device(self, record: Record, param: Tensor) -> Record:
        """A stored record with its tensors on the device of its parameter."""


class DeviceStore(Store):
    """Keeps records where the optimizer made them; nothing is moved."""

    name = "device"

    def to_store(self, records: Records) -> Records:
        return records

    def to_device(self, record: Record, param: Tensor) -> Record:
        return record
