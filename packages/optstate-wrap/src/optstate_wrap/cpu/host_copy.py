"""A device's parameters on the host, with their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_wrap.cpu.lanes import CopyStreams, pinned_like
from optstate_wrap.step.dense import with_strides_of

__all__ = ["HostCopies", "HostCopy"]


class HostCopy:
    """The copy of one parameter, and of its gradient, in page-locked memory that stays.

    Args:
        param: on the device.
        lanes: between that and the host.

    Attributes:
        host: the copy; its ``grad`` is None, or what was taken since the last ``drop``. Both may
            still be under way until ``wait``.
    """

    def __init__(self, param: Tensor, lanes: CopyStreams) -> None:
        self.param = param
        self.lanes = lanes
        self.host = Parameter(pinned_like(param.detach()), requires_grad=param.requires_grad)
        self._layout = _layout(param)
        self._buffer: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def fits(self) -> bool:
        """Whether the parameter still looks as it did: ``model.to`` changes it in place."""
        return self._layout == _layout(self.param)

    def take(self, grad: Tensor) -> None:
        """Bring a gradient to the host, and add it to what is there.

        On a GPU it is added there, so that the sum has the bits of an accumulated gradient and the
        host does not wait.
        """
        if grad.layout is not torch.strided:
            raise TypeError(f"gradient: layout {grad.layout}, must be dense; use .to_dense()")
        # so that it moves as one row of bytes
        grad = with_strides_of(grad.detach(), self.host)
        old = self.host.grad
        if self._buffer is None or self._buffer.dtype != grad.dtype:
            self._buffer = pinned_like(grad)
        with self.lanes.downwards():
            if old is None:
                self._buffer.copy_(grad, non_blocking=True)
            else:
                both = old.to(grad.device, non_blocking=True, copy=True).add_(grad)
                self._buffer.copy_(both, non_blocking=True)
        self._arrived = self.lanes.arrival()
        self.lanes.hold(grad, self._arrived)
        self.host.grad = self._buffer

    def fetch(self) -> None:
        """Bring the parameter to the host as it is now, so that weights loaded since stay."""
        with self.lanes.downwards():
            self.host.detach().copy_(self.param, non_blocking=True)
        self._arrived = self.lanes.arrival()

    def wait(self) -> None:
        """Make the host wait for what is under way to it."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def give(self) -> None:
        """Send the stepped copy to the parameter."""
        with self.lanes.upwards():
            self.param.copy_(self.host.detach(), non_blocking=True)

    def zero(self) -> None:
        """Make the gradient zeros, if there is one."""
        if self.host.grad is not None:
            self.wait()
            self.host.grad.zero_()

    def drop(self) -> None:
        """Forget the gradient; its memory is kept for the next."""
        self.host.grad = None


class HostCopies:
    """The copies that an optimizer needs, and the lanes to each device.

    Attributes:
        made: those made so far, by parameter.
    """

    def __init__(self) -> None:
        self.made: dict[Tensor, HostCopy] = {}
        self._lanes: dict[torch.device, CopyStreams] = {}

    def of(self, param: Tensor) -> HostCopy:
        """The copy of a parameter, made where there is none that fits."""
        copy = self.made.get(param)
        if copy is None or not copy.fits():
            new = HostCopy(param, self._lanes_to(param.device))
            if copy is not None and (grad := copy.host.grad) is not None:
                if grad.shape != param.shape:
                    raise RuntimeError(
                        f"offloaded gradient: shape {tuple(grad.shape)}, must be "
                        f"{tuple(param.shape)} as the parameter's; call zero_grad()"
                    )
                # as model.to takes gradients along
                copy.wait()
                new.take(grad.to(param.dtype))
            copy = self.made[param] = new
        return copy

    def gradient(self, param: Tensor) -> Tensor | None:
        """The gradient that has been taken and is not used up, on the host."""
        return self.made[param].host.grad if param in self.made else None

    def has_gradient(self, param: Tensor) -> bool:
        """Whether one has been taken that is not used up."""
        return self.gradient(param) is not None

    def begin(self, params: Iterable[Tensor]) -> None:
        """Let copies of these begin after all that their devices have been given."""
        for device in {param.device for param in params}:
            self._lanes_to(device).begin()

    def end(self) -> None:
        """Forget gradients, and let devices wait for all copies so far."""
        for copy in self.made.values():
            copy.drop()
        for lanes in self._lanes.values():
            lanes.end()

    def _lanes_to(self, device: torch.device) -> CopyStreams:
        if device not in self._lanes:
            self._lanes[device] = CopyStreams(device)
        return self._lanes[device]


def _layout(param: Tensor) -> tuple[object, ...]:
    return param.device, param.dtype, param.shape, param.stride()
