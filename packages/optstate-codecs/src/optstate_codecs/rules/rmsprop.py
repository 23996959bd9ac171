"""RMSProp with bias correction (Tieleman & Hinton, Coursera lecture 6.5, 2012).

    v = b v + (1 - b) g^2
    p = (1 - lr wd) p - lr g / (sqrt(v / (1 - b^t)) + eps)

The lecture does not correct for v = 0 at the start, which makes the first steps 1 / sqrt(1 - b)
times too long. Here v is divided by 1 - b^t as in Adam, so that this is Adam with b1 = 0. Weight
decay is decoupled. There is no momentum, and so no first moment whose error could be compensated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.plain import PlainFields
from optstate_codecs.rules.arithmetic import add_quotient, average_square_, decayed, root_folded
from optstate_codecs.rules.base import Moment, Rule, Scalar, SquareRoot, host_scalar
from optstate_codecs.triton_lib import constant, fma, jit, reciprocal, sqrt, tl

__all__ = ["RMSProp", "RMSPropHyper"]

# stream 1 shares its random word with the parameter write: at most one hash per element
EMA_SQUARED = Moment("ema_squared", signed=False, stream=1)


@dataclass(frozen=True)
class RMSPropHyper(PlainFields):
    """RMSProp's hyper-parameters; creating one validates them.

    Attributes:
        lr: learning rate, at least 0; a float or one-element tensor.
        beta: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: at least 0.
        maximize: ascend instead of descend.
    """

    lr: Scalar
    beta: Scalar
    eps: float
    weight_decay: float
    maximize: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative("lr", self.lr)
        checks.unit_interval("beta", self.beta)
        checks.nonnegative("eps", self.eps)
        checks.nonnegative("weight_decay", self.weight_decay)
        checks.flag("maximize", self.maximize)


@dataclass(frozen=True)
class RMSProp(Rule):
    """RMSProp, with one moment: ``ema_squared``."""

    name: ClassVar[str] = "rmsprop"
    hyper_type = RMSPropHyper

    def defaults(self) -> dict[str, Any]:
        return {"lr": 1e-3, "beta": 0.999, "eps": 1e-8, "weight_decay": 0.0, "maximize": False}

    def moments(self, hyper: RMSPropHyper) -> tuple[Moment, ...]:
        return (EMA_SQUARED,)

    def device_function(self, hyper: RMSPropHyper) -> tuple[Any, int]:
        return update_tile, hyper.maximize * MAXIMIZE

    def device_row(self, hyper: RMSPropHyper, step: Scalar) -> list[Scalar]:
        return root_folded(self.scalars(hyper, step))

    def variant(self, hyper: RMSPropHyper) -> bool:
        return hyper.maximize

    def scalars(self, hyper: RMSPropHyper, step: Scalar) -> list[Scalar]:
        lr, decay = host_scalar(hyper.lr), host_scalar(hyper.weight_decay)
        beta = host_scalar(hyper.beta)
        return [beta, 1 - beta, 1 - lr * decay, -lr, (1 - beta**step) ** 0.5, hyper.eps]

    def apply(
        self,
        param: Tensor,
        grad: Tensor,
        moments: Mapping[str, Tensor],
        scalars: Sequence[Scalar],
        variant: bool,
        square_root: SquareRoot = torch.sqrt,
    ) -> None:
        beta, one_minus_beta, decay, step_size, bias_correction_sqrt, eps = scalars
        if variant:
            grad = -grad
        decayed(param, grad, decay, True)
        squared = moments["ema_squared"]
        average_square_(squared, grad, beta, one_minus_beta)
        denom = (square_root(squared) / bias_correction_sqrt).add_(eps)
        add_quotient(param, grad, denom, step_size)


MAXIMIZE = 1
_MAXIMIZE = constant(MAXIMIZE)


@jit
def update_tile(p, g, m0, m1, m2, scalars, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The update on a tile: m0 is ema_squared. ``scalars`` hold the correction."""
    beta, one_minus_beta, decay = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    step_size, eps = tl.load(scalars + 3), tl.load(scalars + 4)
    if OPTIONS & _MAXIMIZE:
        g = -g
    m0 = fma(g * one_minus_beta, g, m0 * beta)
    return fma(g * step_size, reciprocal(sqrt(m0) + eps), p * decay), m0, m1, m2
