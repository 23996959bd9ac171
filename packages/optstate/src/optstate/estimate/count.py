"""Counts the bytes of a training step, by where they are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate.models.model import Model
from optstate_codecs import CodedOptimizer, GradientRelease, predicted_state_bytes, state_bytes
from optstate_codecs.offloading import CHUNK_BYTES
from optstate_codecs.offloading.copies import SLOTS
from optstate_codecs.offloading.ring import WAITING
from optstate_codecs.writes import parameter_write

STORES = ("device", "host", "disk")
BUCKET: int = signature(GradientRelease).parameters["bucket_bytes"].default
"""Gradients that are released together; a larger one is alone."""
DISK_BUFFERS = 2 * SLOTS * CHUNK_BYTES
"""Host memory that reads from a file, and writes to it, pass through."""


@dataclass(frozen=True)
class Counted:
    """The bytes of a model and of an optimizer's state, wherever the state is.

    Attributes:
        parameters: of all parameters.
        gradients: of all gradients.
        largest_gradient: of the largest one.
        state: of moments and step counts.
        master: of corrections that make master weights of the parameters.
    """

    parameters: int
    gradients: int
    largest_gradient: int
    state: int
    master: int = 0

    @property
    def stored(self) -> int:
        """Bytes that a store holds."""
        return self.state + self.master


@dataclass(frozen=True)
class Placed:
    """Where the bytes are at the peak of a step, activations apart.

    Attributes:
        store: of the state: "device", "host" or "disk".
        released: whether gradients are released during the backward pass.
        parameters: on the device.
        gradients: on the device.
        state: on the device, corrections included.
        transfer: on the device, for state that passes through.
        host: state in host memory, or the buffers of a file.
        file: of a file with the state.
    """

    store: str
    released: bool
    parameters: int
    gradients: int
    state: int
    transfer: int
    host: int
    file: int

    @property
    def device(self) -> int:
        """All bytes on the device."""
        return self.parameters + self.gradients + self.state + self.transfer

    def row(self, counted: Counted, activations: int, cards: Sequence[float]) -> dict[str, Any]:
        """A row of the report, with bytes under stable keys.

        Args:
            counted: the bytes that are placed.
            activations: bytes to add on the device.
            cards: GPUs to compare with, in GB.
        """
        total = self.device + activations
        return {
            "store": self.store,
            "gradients": "released" if self.released else "kept",
            "parameter_bytes": self.parameters,
            "gradient_bytes": self.gradients,
            "state_bytes": counted.state,
            "master_bytes": counted.master,
            "transfer_bytes": self.transfer,
            "device_bytes": self.device,
            "activation_bytes": activations,
            "total_bytes": total,
            "host_bytes": self.host,
            "file_bytes": self.file,
            "fits_gb": fitting(total, cards),
        }


def count(model: Model, make: Callable[..., Optimizer]) -> Counted:
    """The bytes of a model and of the optimizer that ``make(params)`` builds for it.

    Args:
        model: its trained parameters have gradients of their dtype.
        make: called with parameters on the meta device.

    Raises:
        TypeError, ValueError, RuntimeError: the optimizer does not take the parameters.
    """
    params = model.meta_params()
    optimizer = make(params)
    master = 0
    if isinstance(optimizer, CodedOptimizer):
        master = master_bytes(optimizer)
        state = predicted_state_bytes(optimizer) - master
    else:
        state = stepped_state_bytes(optimizer, params)
    return Counted(
        model.parameter_bytes,
        sum(param.nbytes for param in params),
        max((param.nbytes for param in params), default=0),
        state,
        master,
    )


def master_bytes(optimizer: CodedOptimizer) -> int:
    """Bytes of the corrections that the parameter write keeps, after every parameter's step."""
    return sum(
        component.nbytes(param.numel())
        for group in optimizer.param_groups
        for param in group["params"]
        for component in parameter_write(optimizer.write, param.dtype).components
    )


def stepped_state_bytes(optimizer: Optimizer, params: Sequence[Parameter]) -> int:
    """Bytes of the state that one step on the meta device makes.

    There is no fused or capturable step on meta; their state takes the same bytes.
    """
    for group in optimizer.param_groups:
        group.update({flag: False for flag in ("fused", "capturable") if flag in group})
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()
    return state_bytes(optimizer)


def placed(counted: Counted, store: str, released: bool) -> Placed:
    """Where the bytes are at the peak of a step.

    Of released gradients a bucket exists at a time, or the largest one; and up to 512 MiB more,
    which wait for offloaded state. Offloaded state passes through three chunks on the device. A
    file has the state twice, because a step does not overwrite the state of the step before.
    """
    gradients = counted.gradients
    if released:
        waiting = 0 if store == "device" else WAITING
        gradients = min(gradients, max(BUCKET, counted.largest_gradient) + waiting)
    ring = SLOTS * min(CHUNK_BYTES, counted.stored)
    return Placed(
        store,
        released,
        counted.parameters,
        gradients,
        counted.stored if store == "device" else 0,
        0 if store == "device" else ring,
        {"device": 0, "host": counted.stored, "disk": DISK_BUFFERS}[store],
        2 * counted.stored if store == "disk" else 0,
    )


def placements(counted: Counted, stores: Sequence[str] = STORES) -> Iterator[Placed]:
    """Each store with gradients kept, then released."""
    for store in stores:
        for released in (False, True):
            yield placed(counted, store, released)


def fitting(total: int, cards: Sequence[float]) -> list[float]:
    """The cards, in GB of 10^9 bytes, that have this many bytes."""
    return [card for card in cards if total <= card * 10**9]
