"""Host copies of a device's parameters and gradients, and the streams that copy them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs.offloading.copies import CopyStreams, HeldQueue, record
from optstate_codecs.offloading.pinned import empty_pinned
from optstate_codecs.state.layout import view_bytes_as
from optstate_wrap.step.dense import with_strides_of

__all__ = ["HostCopies", "HostCopy", "HostStreams"]

# bytes of gradients that may wait on the device until they have been copied
WAITING = 1 << 27


class HostStreams(CopyStreams):
    """The streams between a device and the host; without CUDA copies are made at once.

    Copies of both directions run at the same time. Neither direction waits for the other, nor the
    device's own work for them, except in ``begin``, ``end`` and ``held``.

    Attributes:
        held: gradients whose copies to the host are under way.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.held = HeldQueue(WAITING)

    def begin(self) -> None:
        """Have later copies wait for the device's work so far, and for copies to the device."""
        self.follow(self.load)
        self.follow(self.store)
        if self.store is not None:
            self.store.wait_stream(self.load)

    def end(self) -> None:
        """Have the device's own work wait for all copies so far; the host does not wait."""
        self.join(self.store)
        self.join(self.load)
        self.held.clear()


class HostCopy:
    """The copy of one parameter, and of its gradient, in page-locked memory that is kept.

    Args:
        param: the parameter on the device.
        streams: the streams between the device and the host.

    Attributes:
        host: the copy. Its ``grad`` is None, or the sum of the gradients taken since the last
            ``drop``. Copies to both may be under way until ``wait``.
    """

    def __init__(self, param: Tensor, streams: HostStreams) -> None:
        self.param = param
        self.streams = streams
        self.host = Parameter(_pinned_like(param.detach()), requires_grad=param.requires_grad)
        self._layout = _layout(param)
        self._buffer: Tensor | None = None
        self._arrived: Any = None

    def fits(self) -> bool:
        """Whether the parameter has the layout it had; ``model.to`` changes it in place."""
        return self._layout == _layout(self.param)

    def take(self, grad: Tensor) -> None:
        """Copy a gradient to the host, and add it to an earlier one.

        On a GPU it is added there: the sum has the bits of an accumulated gradient, and the host
        does not wait.
        """
        if grad.layout is not torch.strided:
            raise TypeError(f"gradient: layout {grad.layout}, must be dense; use .to_dense()")
        # with the same strides, the copy is one block of bytes
        grad = with_strides_of(grad.detach(), self.host)
        old, streams = self.host.grad, self.streams
        if self._buffer is None or self._buffer.dtype != grad.dtype:
            self._buffer = _pinned_like(grad)
        with streams.on(streams.store, follow=True):
            if old is None:
                self._buffer.copy_(grad, non_blocking=True)
            else:
                both = old.to(grad.device, non_blocking=True, copy=True).add_(grad)
                self._buffer.copy_(both, non_blocking=True)
        self._arrived = record(None, streams.store)
        if self._arrived is not None:
            streams.held.add(grad, grad.nbytes, [(streams.device, self._arrived)])
        self.host.grad = self._buffer

    def fetch(self) -> None:
        """Copy the current parameter to the host, including weights loaded since."""
        with self.streams.on(self.streams.store, follow=True):
            self.host.detach().copy_(self.param, non_blocking=True)
        self._arrived = record(None, self.streams.store)

    def wait(self) -> None:
        """Wait on the host for copies to it that are under way."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def give(self) -> None:
        """Copy the stepped values to the parameter."""
        with self.streams.on(self.streams.load):
            self.param.copy_(self.host.detach(), non_blocking=True)

    def zero(self) -> None:
        """Fill the gradient with zeros, if there is one."""
        if self.host.grad is not None:
            self.wait()
            self.host.grad.zero_()

    def drop(self) -> None:
        """Remove the gradient; its memory is kept for the next one."""
        self.host.grad = None


class HostCopies:
    """The host copies of an optimizer's parameters, and the streams of each device.

    Attributes:
        made: the copies, by parameter.
    """

    def __init__(self) -> None:
        self.made: dict[Tensor, HostCopy] = {}
        self._streams: dict[torch.device, HostStreams] = {}

    def of(self, param: Tensor) -> HostCopy:
        """The copy of a parameter, which is made if there is none that fits."""
        copy = self.made.get(param)
        if copy is None or not copy.fits():
            new = HostCopy(param, self._streams_of(param.device))
            if copy is not None and (grad := copy.host.grad) is not None:
                if grad.shape != param.shape:
                    raise RuntimeError(
                        f"offloaded gradient: shape {tuple(grad.shape)}, must be "
                        f"{tuple(param.shape)} as the parameter's; call zero_grad()"
                    )
                # model.to takes gradients along too
                copy.wait()
                new.take(grad.to(param.dtype))
            copy = self.made[param] = new
        return copy

    def gradient(self, param: Tensor) -> Tensor | None:
        """The gradient on the host that no step has used yet, or None."""
        return self.made[param].host.grad if param in self.made else None

    def begin(self, params: Iterable[Tensor]) -> None:
        """Have copies of these parameters wait for the work of their devices so far."""
        for device in {param.device for param in params}:
            self._streams_of(device).begin()

    def end(self) -> None:
        """Remove all gradients, and have devices wait for all copies so far."""
        for copy in self.made.values():
            copy.drop()
        for streams in self._streams.values():
            streams.end()

    def _streams_of(self, device: torch.device) -> HostStreams:
        if device not in self._streams:
            self._streams[device] = HostStreams(device)
        return self._streams[device]


def _pinned_like(tensor: Tensor) -> Tensor:
    """Host memory for a tensor's copy, page-locked if the tensor is on a GPU."""
    like = torch.empty_like(tensor, device="meta")
    return view_bytes_as(empty_pinned(tensor.nbytes, tensor.is_cuda), 0, like)


def _layout(param: Tensor) -> tuple[object, ...]:
    return param.device, param.dtype, param.shape, param.stride()
