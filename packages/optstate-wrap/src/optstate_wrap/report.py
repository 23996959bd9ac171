"""How much a wrapped optimizer's state takes, and how much its decoded state would."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.optim import Optimizer

from optstate_codecs.memory import MemoryReport, local_elements, storage_bytes
from optstate_wrap.state.decoded import States
from optstate_wrap.state.record import Coded, Record, tensors_of
from optstate_wrap.state.store import Store

__all__ = ["WrapperMemoryReport", "report"]


@dataclass(frozen=True)
class WrapperMemoryReport(MemoryReport):
    """Bytes that training holds between steps.

    Attributes:
        plain_state_bytes: what the state would take without the wrapper.
        host_bytes: how much of ``state_bytes`` is in the host's memory while parameters are not.
    """

    plain_state_bytes: int = 0
    host_bytes: int = 0

    @property
    def saved(self) -> float:
        """The share of the plain state that is saved, 0 to 1."""
        return 1 - self.state_bytes / max(self.plain_state_bytes, 1)


def report(optimizer: Optimizer, store: Store, states: States) -> WrapperMemoryReport:
    """Count what an optimizer whose state is in ``store``, and is read in ``states``, holds."""
    states.write_back()
    params = list(dict.fromkeys(p for g in optimizer.param_groups for p in g["params"]))
    foreign = list(tensors_of([states.foreign, states.extra]))
    tensors = [t for record in _records_of(store) for t in tensors_of(record)] + foreign
    away = any(param.device.type != "cpu" for param in params)
    return WrapperMemoryReport(
        parameters=sum(map(local_elements, params)),
        parameter_bytes=storage_bytes(params),
        gradient_bytes=storage_bytes([p.grad for p in params if p.grad is not None]),
        state_bytes=storage_bytes(tensors),
        plain_state_bytes=_plain_bytes(store) + sum(tensor.nbytes for tensor in foreign),
        host_bytes=storage_bytes([t for t in tensors if away and t.device.type == "cpu"]),
    )


def _records_of(store: Store) -> Iterable[Record]:
    """Every record as it is kept."""
    for param in store:
        yield from store.records(param)


def _plain_bytes(store: Store) -> int:
    """Bytes that the decoded state takes."""
    total = 0
    for record in _records_of(store):
        for value in record.values():
            if isinstance(value, Coded):
                total += value.numel * value.dtype.itemsize
            else:
                total += sum(tensor.nbytes for tensor in tensors_of(value))
    return total
