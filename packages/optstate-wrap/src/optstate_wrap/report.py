"""The memory report of a wrapped optimizer: bytes of stored state, and of the same decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optstate_codecs.memory import MemoryReport, memory_report, storage_bytes
from optstate_wrap.state.decoded import DecodedStates
from optstate_wrap.state.record import Coded, tensors_of

__all__ = ["WrapperMemoryReport", "report"]


@dataclass(frozen=True)
class WrapperMemoryReport(MemoryReport):
    """Bytes that training holds between steps.

    Attributes:
        parameters: elements in all parameters; of a ``DTensor``, those of its shard here.
        parameter_bytes: their storage.
        gradient_bytes: storage of the gradients that exist now.
        state_bytes: storage of the wrapped optimizer's state, as it is stored.
        plain_state_bytes: bytes of the state without the wrapper.
        host_bytes: the part of ``state_bytes`` in host memory; 0 if all parameters
            are there as well.
    """

    plain_state_bytes: int = 0
    host_bytes: int = 0

    @property
    def saved(self) -> float:
        """The fraction of the plain state's bytes that is saved, 0 to 1."""
        return 1 - self.state_bytes / max(self.plain_state_bytes, 1)


def report(states: DecodedStates) -> WrapperMemoryReport:
    """Count the bytes that the optimizer of ``states`` holds between steps."""
    states.write_back()
    counted = memory_report(states.encoder.inner)
    records = [record for param in states.store for record in states.store.records(param)]
    tensors = list(tensors_of([records, states.foreign, states.extra]))
    groups = states.encoder.inner.param_groups
    on_device = any(param.device.type != "cpu" for group in groups for param in group["params"])
    values = [value for record in records for value in record.values()]
    return WrapperMemoryReport(
        **{**vars(counted), "state_bytes": storage_bytes(tensors)},
        plain_state_bytes=sum(map(_plain_bytes, [*values, states.foreign, states.extra])),
        host_bytes=storage_bytes([t for t in tensors if on_device and t.device.type == "cpu"]),
    )


def _plain_bytes(value: Any) -> int:
    """Bytes of a value of a record after decoding."""
    if isinstance(value, Coded):
        return value.numel * value.dtype.itemsize
    return sum(tensor.nbytes for tensor in tensors_of(value))
