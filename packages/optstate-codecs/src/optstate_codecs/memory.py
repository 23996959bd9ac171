"""Byte counts of optimizer state: the present ones over real storages, and predicted ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.param_checks import check_params
from optstate_codecs.sharding import is_distributed, local_of, shard_formats
from optstate_codecs.state.components import components_of
from optstate_codecs.state.dim_order import follows_order
from optstate_codecs.state.layout import Declaration, bound
from optstate_codecs.state.owner import StateOwner
from optstate_codecs.writes import MASTER, parameter_write

__all__ = ["MemoryReport", "memory_report", "predicted_state_bytes", "state_bytes"]

STEP_BYTES = 4
ORDER_BYTES = 8


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor in a value; ``seen`` has the objects that were looked into."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        # a subclass without storage of its own; some libraries keep state in these
        for name in value.__tensor_flatten__()[0]:
            # a DTensor also names its mesh, which is not state
            if isinstance(part := getattr(value, name), Tensor):
                yield from _tensors(part, seen)
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in seen:
        # other libraries keep state in objects of their own
        seen.add(id(value))
        yield from _tensors(vars(value), seen)


def storage_bytes(values: Any) -> int:
    """Bytes of the storages of tensors, each counted once and whole.

    Args:
        values: tensors, in lists, tuples, dicts and attributes of objects; of a ``DTensor`` its
            shard counts.
    """
    storages = {}
    for tensor in _tensors(values, set()):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[(tensor.device, storage.data_ptr() or id(tensor))] = storage.nbytes()
    return sum(storages.values())


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of every tensor in ``optimizer.state``, each storage counted once and whole.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
    """
    return storage_bytes(dict(optimizer.state))


def predicted_state_bytes(optimizer: StateOwner) -> int:
    """Bytes of the state after every parameter has been stepped.

    Exact: the sum of the components that formats and write declare, 4 bytes of step count per
    parameter, and 8 for the order of dimensions (``dim_order``) if blocks follow one of several.
    Of a ``DTensor`` the shard of this process counts.

    Args:
        optimizer: an optimizer of the family, before or after its first step.

    Raises:
        TypeError: the optimizer is not of the family, or a parameter is of a class that it does
            not step.
    """
    given: object = optimizer
    if not hasattr(given, "group_formats"):
        raise TypeError(
            f"optimizer: {type(given).__name__}, must be an optimizer of the family; of any other, "
            "state_bytes(optimizer) counts the state after a step"
        )
    check_params(optimizer)
    total = 0
    for group in optimizer.param_groups:
        formats = optimizer.group_formats(group)
        for owner in group["params"]:
            param, write = local_of(owner), parameter_write(optimizer.write, owner.dtype)
            sized = shard_formats(formats, owner) if is_distributed(owner) else formats
            stored: dict[str, Declaration] = {**bound(sized, param), MASTER: write}
            parts = components_of(stored).values()
            total += STEP_BYTES + sum(part.nbytes(param.numel()) for part in parts)
            total += ORDER_BYTES * follows_order(param, stored.values())
    return total


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of parameters, gradients and optimizer state between steps.

    Attributes:
        parameters: elements in all parameters; of a ``DTensor``, those of its shard here.
        parameter_bytes: their storage.
        gradient_bytes: storage of the gradients that exist now.
        state_bytes: storage of the optimizer's state.
    """

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int

    @property
    def state_bits_per_parameter(self) -> float:
        """Bits of optimizer state per parameter element."""
        return 8 * self.state_bytes / max(self.parameters, 1)


def memory_report(optimizer: Optimizer) -> MemoryReport:
    """Count the present bytes of parameters, gradients and state.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
    """
    params = list(dict.fromkeys(p for group in optimizer.param_groups for p in group["params"]))
    return MemoryReport(
        parameters=sum(local_of(param).numel() for param in params),
        parameter_bytes=storage_bytes(params),
        gradient_bytes=storage_bytes([p.grad for p in params if p.grad is not None]),
        state_bytes=state_bytes(optimizer),
    )
