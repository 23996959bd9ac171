"""LPFAdamW: AdamW on gradients amplified by their own low-pass filtered mean.

    s = b1 s + (1 - b1) g
    a = g + f s
    m = b2 m + (1 - b2) a
    v = b3 v + (1 - b3) a^2
    p = (1 - lr wd) p - lr / (1 - b2^t) * m / (sqrt(v / (1 - b3^t)) + eps)

The formula is that of the public optimizer of this name (2024; there is no paper): Compass's
filter, followed by AdamW. f is ``amp_fac``. Weight decay is decoupled. There is no error feedback:
s enters the second moment too, so steps are not linear in its errors.
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

__all__ = ["LPFAdamW", "LPFAdamWHyper"]

# streams 2 and 3 share a random word, as do stream 1 and the parameter write
EMA = Moment("ema", signed=True, stream=2, relative_to="ema_squared")
EMA_SQUARED = Moment("ema_squared", signed=False, stream=3)
SMOOTHING = Moment("smoothing", signed=True, stream=1)


@dataclass(frozen=True)
class LPFAdamWHyper(PlainFields):
    """LPFAdamW's hyper-parameters; creating one validates them.

    Attributes:
        lr: learning rate, at least 0; a float or one-element tensor.
        betas: decay rates of the filter and of the two moments, each in [0, 1).
        amp_fac: multiple of the filter's output that is added to the gradient, at least 0.
        eps: added to the root of the second moment, at least 0.
        weight_decay: at least 0.
        maximize: ascend instead of descend.
    """

    lr: Scalar
    betas: tuple[Scalar, Scalar, Scalar]
    amp_fac: Scalar
    eps: float
    weight_decay: float
    maximize: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "amp_fac", "eps", "weight_decay"):
            checks.nonnegative(name, getattr(self, name))
        checks.betas(self.betas, 3)
        checks.flag("maximize", self.maximize)


@dataclass(frozen=True)
class LPFAdamW(Rule):
    """LPFAdamW, with three moments: ``ema``, ``ema_squared`` and ``smoothing``.

    Args:
        corrected_decay: whether weight decay uses lr / (1 - b2^t) for lr.
    """

    name: ClassVar[str] = "lpf_adamw"
    hyper_type = LPFAdamWHyper
    corrected_decay: bool = False

    def defaults(self) -> dict[str, Any]:
        return {
            "lr": 1e-3,
            "betas": (0.9, 0.9, 0.999),
            "amp_fac": 2.0,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "maximize": False,
        }

    def moments(self, hyper: LPFAdamWHyper) -> tuple[Moment, ...]:
        return (EMA, EMA_SQUARED, SMOOTHING)

    def device_function(self, hyper: LPFAdamWHyper) -> tuple[Any, int]:
        far_flags = far(hyper.betas[0]) * FAR1 + far(hyper.betas[1]) * FAR2
        return update_tile, far_flags + hyper.maximize * MAXIMIZE

    def device_row(self, hyper: LPFAdamWHyper, step: Scalar) -> list[Scalar]:
        return root_folded(self.scalars(hyper, step))

    def variant(self, hyper: LPFAdamWHyper) -> bool:
        return hyper.maximize

    def scalars(self, hyper: LPFAdamWHyper, step: Scalar) -> list[Scalar]:
        lr, decay = host_scalar(hyper.lr), host_scalar(hyper.weight_decay)
        beta1, beta2, beta3 = map(host_scalar, hyper.betas)
        step_size = lr / (1 - beta2**step)
        return [
            1 - beta1,
            host_scalar(hyper.amp_fac),
            1 - beta2,
            beta3,
            1 - beta3,
            1 - (step_size if self.corrected_decay else lr) * decay,
            -step_size,
            (1 - beta3**step) ** 0.5,
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
        one_minus_beta1, amp_fac, one_minus_beta2, beta3, one_minus_beta3 = scalars[:5]
        decay, step_size, bias_correction_sqrt, eps = scalars[5:]
        if variant:
            grad = -grad
        decayed(param, grad, decay, True)
        mean, squared, smooth = (moments[m.name] for m in (EMA, EMA_SQUARED, SMOOTHING))
        smooth.lerp_(grad, one_minus_beta1)
        grad = add_scaled(grad, smooth, amp_fac)
        mean.lerp_(grad, one_minus_beta2)
        average_square_(squared, grad, beta3, one_minus_beta3)
        denom = (square_root(squared) / bias_correction_sqrt).add_(eps)
        add_quotient(param, mean, denom, step_size)


MAXIMIZE, FAR1, FAR2 = 1, 2, 4
_MAXIMIZE, _FAR1, _FAR2 = map(constant, (MAXIMIZE, FAR1, FAR2))


@jit
def update_tile(p, g, m0, m1, m2, scalars, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The update on a tile: m0 is ema, m1 ema_squared, m2 smoothing.

    ``scalars`` hold the bias corrections.
    """
    one_minus_beta1, amp_fac = tl.load(scalars), tl.load(scalars + 1)
    one_minus_beta2 = tl.load(scalars + 2)
    beta3, one_minus_beta3 = tl.load(scalars + 3), tl.load(scalars + 4)
    decay, step_size, eps = tl.load(scalars + 5), tl.load(scalars + 6), tl.load(scalars + 7)
    if OPTIONS & _MAXIMIZE:
        g = -g
    m2 = lerp(m2, g, one_minus_beta1, OPTIONS & _FAR1)
    g = fma(m2, amp_fac, g)
    m0 = lerp(m0, g, one_minus_beta2, OPTIONS & _FAR2)
    m1 = fma(g * one_minus_beta3, g, m1 * beta3)
    return fma(m0 * step_size, reciprocal(sqrt(m1) + eps), p * decay), m0, m1, m2
