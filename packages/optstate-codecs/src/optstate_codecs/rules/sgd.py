"""SGD: stochastic gradient descent with momentum, plain or Nesterov's.

Momentum is Polyak's (1964) in the form of ``torch.optim.SGD``; Nesterov momentum is that of
Sutskever et al., ICML 2013; decoupled decay is SGDW of Loshchilov & Hutter, arXiv:1711.05101,
algorithm 1.

    b = g                        at the first step
    b = mu b + (1 - tau) g       afterwards
    p = p - lr b                 or, with ``nesterov``,  p - lr (g + mu b)

Decoupled decay multiplies p by (1 - lr wd) before the step; coupled decay adds wd p to g. Without
momentum nothing is stored, and p = p - lr g. The operations and their order are those of
``torch.optim``'s single-tensor path, so that a float32 buffer gives its bits.

``error_feedback`` compensates the error of storing b, e = b - stored b, as in ``rules.adam``.
Stored exactly, e would enter the next steps with weights mu + mu^2 + ... = mu / (1 - mu), and once
more mu with ``nesterov``. Their sum is applied at once:

    p = p - lr mu / (1 - mu) e   or, with ``nesterov``,  p - lr mu^2 / (1 - mu) e

The format of b needs a level for zero. Without one, parameters that have no gradients would move,
since there is no second moment that could decode b to zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.plain import PlainFields
from optstate_codecs.rules.arithmetic import add_scaled, add_scaled_, decayed
from optstate_codecs.rules.base import Moment, Rule, Scalar, SquareRoot, host_scalar
from optstate_codecs.triton_lib import constant, fma, jit, tl

__all__ = ["SGD", "SGDHyper"]

# stream 1 shares its random word with the parameter write: at most one hash per element
MOMENTUM_BUFFER = Moment("momentum_buffer", signed=True, stream=1)


@dataclass(frozen=True)
class SGDHyper(PlainFields):
    """SGD's hyper-parameters; creating one validates them.

    Attributes:
        lr: learning rate, at least 0; a float or one-element tensor.
        momentum: factor of the buffer at each step, at least 0.
        dampening: share of the gradient that does not enter the buffer, after the first step.
        weight_decay: at least 0.
        nesterov: use Nesterov momentum; requires momentum above 0 and dampening 0.
        maximize: ascend instead of descend.
    """

    lr: Scalar
    momentum: Scalar
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "momentum", "dampening", "weight_decay"):
            checks.nonnegative(name, getattr(self, name))
        checks.flag("nesterov", self.nesterov)
        checks.flag("maximize", self.maximize)
        if self.nesterov and not (self.has_momentum and host_scalar(self.dampening) == 0):
            raise ValueError("nesterov=True: must have momentum above 0 and dampening 0")

    @property
    def has_momentum(self) -> bool:
        """Whether there is a buffer; True where momentum is on a device and cannot be read."""
        momentum = host_scalar(self.momentum)
        return isinstance(momentum, Tensor) or momentum != 0


@dataclass(frozen=True)
class SGD(Rule):
    """SGD with momentum, or SGDW with ``decoupled``.

    Args:
        decoupled: whether weight decay is decoupled.
        error_feedback: whether each step compensates the error of storing the buffer; ``momentum``
            must be below 1 then.
    """

    name: ClassVar[str] = "sgd"
    hyper_type = SGDHyper
    in_torch: ClassVar[bool] = True
    counted: ClassVar[bool] = False
    decoupled: bool = False
    error_feedback: bool = False

    @property
    def has_error_feedback(self) -> bool:
        return self.error_feedback

    def hyper(self, group: Mapping[str, Any]) -> Any:
        hyper = super().hyper(group)
        momentum = host_scalar(hyper.momentum)
        if self.error_feedback and not isinstance(momentum, Tensor) and momentum >= 1:
            raise ValueError(f"momentum={momentum}: must be below 1 with error_feedback=True")
        return hyper

    def defaults(self) -> dict[str, Any]:
        return {
            "lr": 1e-3,
            "momentum": 0.0,
            "dampening": 0.0,
            "weight_decay": 0.0,
            "nesterov": False,
            "maximize": False,
        }

    def moments(self, hyper: SGDHyper) -> tuple[Moment, ...]:
        return (MOMENTUM_BUFFER,) if hyper.has_momentum else ()

    def device_function(self, hyper: SGDHyper) -> tuple[Any, int]:
        options = self.decoupled * DECOUPLED + hyper.nesterov * NESTEROV + hyper.maximize * MAXIMIZE
        return update_tile, options + hyper.has_momentum * BUFFER

    def device_error_feedback(self) -> Any:
        return error_feedback_tile

    def variant(self, hyper: SGDHyper) -> tuple[bool, bool]:
        return hyper.nesterov, hyper.maximize

    def scalars(self, hyper: SGDHyper, step: Scalar) -> list[Scalar]:
        lr, decay = host_scalar(hyper.lr), host_scalar(hyper.weight_decay)
        # a bool tensor times a number would have torch's default dtype
        after_first = (step > 1).to(step.dtype) if isinstance(step, Tensor) else step > 1
        momentum = host_scalar(hyper.momentum)
        scalars = [
            momentum,
            1 - host_scalar(hyper.dampening) * after_first,
            1 - lr * decay if self.decoupled else decay,
            -lr,
        ]
        if self.has_error_feedback:
            later = momentum / (1 - momentum)
            scalars.append(-lr * (later * momentum if hyper.nesterov else later))
        return scalars

    def apply(
        self,
        param: Tensor,
        grad: Tensor,
        moments: Mapping[str, Tensor],
        scalars: Sequence[Scalar],
        variant: tuple[bool, bool],
        square_root: SquareRoot = torch.sqrt,
    ) -> None:
        momentum, one_minus_dampening, decay, step_size = scalars[:4]
        nesterov, maximize = variant
        if maximize:
            grad = -grad
        grad = decayed(param, grad, decay, self.decoupled)
        buffer = moments.get("momentum_buffer")
        if buffer is not None:
            buffer.mul_(momentum)
            add_scaled_(buffer, grad, one_minus_dampening)
            grad = add_scaled(grad, buffer, momentum) if nesterov else buffer
        add_scaled_(param, grad, step_size)

    def apply_error_feedback(
        self,
        param: Tensor,
        residual: Tensor,
        moments: Mapping[str, Tensor],
        scalars: Sequence[Scalar],
        variant: tuple[bool, bool],
        square_root: SquareRoot = torch.sqrt,
    ) -> None:
        add_scaled_(param, residual, scalars[4])


DECOUPLED, NESTEROV, MAXIMIZE, BUFFER = 1, 2, 4, 8
_DECOUPLED, _NESTEROV = map(constant, (DECOUPLED, NESTEROV))
_MAXIMIZE, _BUFFER = map(constant, (MAXIMIZE, BUFFER))


@jit
def update_tile(p, g, m0, m1, m2, scalars, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The update on a tile: m0 is momentum_buffer, if there is one."""
    momentum, one_minus_dampening = tl.load(scalars), tl.load(scalars + 1)
    decay, step_size = tl.load(scalars + 2), tl.load(scalars + 3)
    if OPTIONS & _MAXIMIZE:
        g = -g
    if OPTIONS & _DECOUPLED:
        p = p * decay
    else:
        g = fma(p, decay, g)
    update = g
    if OPTIONS & _BUFFER:
        m0 = fma(g, one_minus_dampening, m0 * momentum)
        update = m0
    if OPTIONS & _NESTEROV:
        update = fma(m0, momentum, g)
    return fma(update, step_size, p), m0, m1, m2


@jit
def error_feedback_tile(m1, m2, scalars, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The factor of ``SGD.apply_error_feedback``."""
    return tl.load(scalars + 4)
