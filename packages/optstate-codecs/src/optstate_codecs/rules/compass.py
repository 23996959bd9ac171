"""Compass: a gradient amplified by its running mean, divided by the root of its second moment.

    m = b1 m + (1 - b1) g
    a = g + f m
    v = b2 v + (1 - b2) a^2
    p = (1 - lr wd) p - lr / (1 - b1^t) * a / (sqrt(v / (1 - b2^t)) + eps)

The formula is that of the public optimizer of this name (2024; there is no paper); f is
``amp_fac``. Since a is not a mean, the correction 1 - b1^t makes the first steps lr / (1 - b1)
long, which is 100 lr by default, so that a warm-up is advisable. Weight decay is decoupled.

There is no error feedback: m enters the second moment too, so steps are not linear in its errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.plain import PlainFields
from optstate_codecs.rules.arithmetic import (
    add_quotient,
    add_scaled,
    average_square_,
    decayed,
    far,
    root_folded,
)
from optstate_codecs.rules.base import Moment, Rule, Scalar, SquareRoot, host_scalar
from optstate_codecs.triton_lib import constant, fma, jit, lerp, reciprocal, sqrt, tl

__all__ = ["Compass", "CompassHyper"]

# streams 2 and 3 share a random word, so that fp32 parameters need one hash per element
EMA = Moment("ema", signed=True, stream=2, relative_to="ema_squared")
EMA_SQUARED = Moment("ema_squared", signed=False, stream=3)


@dataclass(frozen=True)
class CompassHyper(PlainFields):
    """Compass's hyper-parameters; creating one validates them.

    Attributes:
        lr: learning rate, at least 0; a float or one-element tensor.
        betas: decay rates of the two moments, each in [0, 1).
        amp_fac: multiple of the running mean that is added to the gradient, at least 0.
        eps: added to the root of the second moment, at least 0.
        weight_decay: at least 0.
        maximize: ascend instead of descend.
    """

    lr: Scalar
    betas: tuple[Scalar, Scalar]
    amp_fac: Scalar
    eps: float
    weight_decay: float
    maximize: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "amp_fac", "eps", "weight_decay"):
            checks.nonnegative(name, getattr(self, name))
        checks.betas(self.betas, 2)
        checks.flag("maximize", self.maximize)


@dataclass(frozen=True)
class Compass(Rule):
    """Compass, with two moments: ``ema`` and ``ema_squared``.

    Args:
        corrected_decay: whether weight decay uses lr / (1 - b1^t) for lr.
    """

    name: ClassVar[str] = "compass"
    hyper_type = CompassHyper
    corrected_decay: bool = False

    def defaults(self) -> dict[str, Any]:
        return {
            "lr": 1e-3,
            "betas": (0.99, 0.999),
            "amp_fac": 5.0,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "maximize": False,
        }

    def moments(self, hyper: CompassHyper) -> tuple[Moment, ...]:
        return (EMA, EMA_SQUARED)

    def device_function(self, hyper: CompassHyper) -> tuple[Any, int]:
        return update_tile, hyper.maximize * MAXIMIZE + far(hyper.betas[0]) * FAR

    def device_row(self, hyper: CompassHyper, step: Scalar) -> list[Scalar]:
        return root_folded(self.scalars(hyper, step))

    def variant(self, hyper: CompassHyper) -> bool:
        return hyper.maximize

    def scalars(self, hyper: CompassHyper, step: Scalar) -> list[Scalar]:
        lr, decay = host_scalar(hyper.lr), host_scalar(hyper.weight_decay)
        beta1, beta2 = map(host_scalar, hyper.betas)
        step_size = lr / (1 - beta1**step)
        return [
            1 - beta1,
            host_scalar(hyper.amp_fac),
            beta2,
            1 - beta2,
            1 - (step_size if self.corrected_decay else lr) * decay,
            -step_size,
            (1 - beta2**step) ** 0.5,
            hyper.eps,
        ]

    def apply(
        self,
        param: Tensor,
        grad: Tensor,
        moments: Mapping[str, Tensor],
        scalars: Sequence[Scalar],
        variant: bool,
        square_root: SquareRoot = torch.sqrt,
    ) -> None:
        one_minus_beta1, amp_fac, beta2, one_minus_beta2 = scalars[:4]
        decay, step_size, bias_correction_sqrt, eps = scalars[4:]
        if variant:
            grad = -grad
        decayed(param, grad, decay, True)
        mean, squared = moments["ema"], moments["ema_squared"]
        mean.lerp_(grad, one_minus_beta1)
        grad = add_scaled(grad, mean, amp_fac)
        average_square_(squared, grad, beta2, one_minus_beta2)
        denom = (square_root(squared) / bias_correction_sqrt).add_(eps)
        add_quotient(param, grad, denom, step_size)


MAXIMIZE, FAR = 1, 2
_MAXIMIZE, _FAR = map(constant, (MAXIMIZE, FAR))


@jit
def update_tile(p, g, m0, m1, m2, scalars, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The update on a tile: m0 is ema, m1 ema_squared. ``scalars`` hold the corrections."""
    one_minus_beta1, amp_fac = tl.load(scalars), tl.load(scalars + 1)
    beta2, one_minus_beta2, decay = tl.load(scalars + 2), tl.load(scalars + 3), tl.load(scalars + 4)
    step_size, eps = tl.load(scalars + 5), tl.load(scalars + 6)
    if OPTIONS & _MAXIMIZE:
        g = -g
    m0 = lerp(m0, g, one_minus_beta1, OPTIONS & _FAR)
    g = fma(m0, amp_fac, g)
    m1 = fma(g * one_minus_beta2, g, m1 * beta2)
    return fma(g * step_size, reciprocal(sqrt(m1) + eps), p * decay), m0, m1, m2
