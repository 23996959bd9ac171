"""Where records live between steps, as something to load from and to store to.

A store takes the records of a whole batch at once, so that it can move them as one slab.
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
    """Records by parameter, a list of one for each part.

    ``load`` brings the records of a batch to the parameters' device; ``save`` makes new ones what
    is stored, all at once: if it raises, what was stored before still is.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.entries: dict[Tensor, list[Record]] = {}
        # of parameters in parts, the layout by which they were cut
        self._layouts: dict[Tensor, Layout] = {}
        #: has all that a session still stores where the records show it
        self.synchronize: Callable[[], None] | None = None

    def __contains__(self, param: object) -> bool:
        return param in self.entries

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def records(self, param: Tensor) -> list[Record]:
        """What is stored of a parameter, where it is stored."""
        if self.synchronize is not None:
            self.synchronize()
        return self.entries[param]

    def latest_records(self, param: Tensor) -> Sequence[Record]:
        """The same, of whose tensors nobody may read the numbers: they may be under way.

        Nothing, where nothing is stored.
        """
        return self.entries.get(param, ())

    def load(self, batch: Sequence[ParamChunk]) -> list[Record | None]:
        """The records of a batch beside their parameters, None where there is none yet."""
        return [
            self.to_device(self.records(chunk.param)[chunk.part], chunk.param)
            if chunk.param in self
            # what has not been stepped
            else None
            for chunk in batch
        ]

    def save(self, param: Tensor, records: list[Record], layout: Layout | None = None) -> None:
        """Store the records of a whole parameter, cut by ``layout``, None: that which it has."""
        self.swap([param], self.to_store([records]))
        self._lay(param, records, layout)

    def swap(self, params: Sequence[Tensor], records: Records) -> None:
        """Keep these records of whole parameters, already ``placed``, for those that were."""
        self.entries.update(zip(params, records, strict=True))
        for param, parts in zip(params, records, strict=True):
            self._lay(param, parts, None)

    def layout(self, param: Tensor) -> Layout:
        """The layout by which the records of a parameter were cut."""
        return self._layouts.get(param) or Layout.of(param)

    def _lay(self, param: Tensor, parts: Sequence[Record], layout: Layout | None) -> None:
        if len(parts) > 1:
            self._layouts[param] = layout or Layout.of(param)
        elif self._layouts:
            self._layouts.pop(param, None)

    def discard(self, records: Sequence[Record]) -> None:  # noqa: B027
        """Nobody keeps these records, which were ``placed``, or their tensors are others now."""

    def expect(self, batches: Sequence[Sequence[ParamChunk]]) -> None:  # noqa: B027
        """A step is going to ``load`` these chunks, in order."""

    def end(self, whole: bool) -> None:  # noqa: B027
        """The step that expected chunks is over, or, if not ``whole``, a part of a step."""

    def is_staged(self, tensor: Tensor) -> bool:
        """Whether a tensor that was loaded is a copy of what is kept."""
        return False

    def wait(self) -> None:  # noqa: B027
        """Wait until what is kept is what ``placed`` was given."""

    def replace(self, kept: dict[Tensor, list[Record]]) -> None:
        """Keep these, already ``placed``, and nothing else."""
        self.entries = kept
        self._layouts = {param: Layout.of(param) for param, r in kept.items() if len(r) > 1}

    def drop(self, param: Tensor) -> None:
        """Forget a parameter's records."""
        del self.entries[param]
        self._layouts.pop(param, None)

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self._layouts.clear()

    def make_executor(self) -> ResidentExecutor | StreamingExecutor:
        """What steps units whose state is kept here."""
        return ResidentExecutor("auto")

    def __getstate__(self) -> dict[str, Any]:
        # a copy has a session of its own
        if self.synchronize is not None:
            self.synchronize()
        return {**self.__dict__, "synchronize": None}

    @abstractmethod
    def to_store(self, records: Records) -> Records:
        """The records as this store keeps them."""

    @abstractmethod
    def to_device(self, record: Record, param: Tensor) -> Record:
        """A kept record, beside its parameter."""


class DeviceStore(Store):
    """Records stay where the optimizer made them: nothing is moved."""

    name = "device"

    def to_store(self, records: Records) -> Records:
        return records

    def to_device(self, record: Record, param: Tensor) -> Record:
        return record
