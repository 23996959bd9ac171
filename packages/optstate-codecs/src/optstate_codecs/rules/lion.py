"""Lion: the sign of a momentum (Chen et al., arXiv:2302.06675, algorithm 2).

    u = sign(b1 m + (1 - b1) g)
    p = (1 - lr wd) p - lr u
    m = b2 m + (1 - b2) g

Every element moves by lr, or not at all where u is 0. Weight decay is decoupled. Where the argument
of the sign is infinite or NaN, the parameter becomes NaN, so that a bad gradient is not hidden.

There is no error feedback. Adam's steps are linear in m, so what an error of m takes from the later
steps is known when it is made. Here only the sign of m acts: whether an error changes a later step,
and by 2 lr or not at all, depends on gradients that are not known yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.plain import PlainFields
from optstate_codecs.rules.arithmetic import add_scaled_, decayed, far
from optstate_codecs.rules.base import Moment, Rule, Scalar, SquareRoot, host_scalar
from optstate_codecs.triton_lib import constant, fma, jit, lerp, tl

__all__ = ["Lion", "LionHyper"]

# stream 1 shares its random word with the parameter write: at most one hash per element
EXP_AVG = Moment("exp_avg", signed=True, stream=1)


@dataclass(frozen=True)
class LionHyper(PlainFields):
    """Lion's hyper-parameters; creating one validates them.

    Attributes:
        lr: the distance that each element moves, at least 0; a float or one-element tensor.
        betas: weight of the momentum in the update, and its decay rate, each in [0, 1).
        weight_decay: at least 0.
        maximize: ascend instead of descend.
    """

    lr: Scalar
    betas: tuple[Scalar, Scalar]
    weight_decay: float
    maximize: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative("lr", self.lr)
        checks.betas(self.betas, 2)
        checks.nonnegative("weight_decay", self.weight_decay)
        checks.flag("maximize", self.maximize)


@dataclass(frozen=True)
class Lion(Rule):
    """Lion, with one moment: ``exp_avg``."""

    name: ClassVar[str] = "lion"
    hyper_type = LionHyper

    def defaults(self) -> dict[str, Any]:
        return {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False}

    def moments(self, hyper: LionHyper) -> tuple[Moment, ...]:
        return (EXP_AVG,)

    def device_function(self, hyper: LionHyper) -> tuple[Any, int]:
        far_flags = far(hyper.betas[0]) * FAR1 + far(hyper.betas[1]) * FAR2
        return update_tile, far_flags + hyper.maximize * MAXIMIZE

    def variant(self, hyper: LionHyper) -> bool:
        return hyper.maximize

    def scalars(self, hyper: LionHyper, step: Scalar) -> list[Scalar]:
        lr, decay = host_scalar(hyper.lr), host_scalar(hyper.weight_decay)
        beta1, beta2 = map(host_scalar, hyper.betas)
        return [1 - beta1, 1 - beta2, 1 - lr * decay, -lr]

    def apply(
        self,
        param: Tensor,
        grad: Tensor,
        moments: Mapping[str, Tensor],
        scalars: Sequence[Scalar],
        variant: bool,
        square_root: SquareRoot = torch.sqrt,
    ) -> None:
        one_minus_beta1, one_minus_beta2, decay, step_size = scalars
        if variant:
            grad = -grad
        decayed(param, grad, decay, True)
        exp_avg = moments["exp_avg"]
        update = exp_avg.lerp(grad, one_minus_beta1)
        # update * 0.0 is NaN where the update is not finite
        add_scaled_(param, update.sign() + update * 0.0, step_size)
        exp_avg.lerp_(grad, one_minus_beta2)


MAXIMIZE, FAR1, FAR2 = 1, 2, 4
_MAXIMIZE, _FAR1, _FAR2 = map(constant, (MAXIMIZE, FAR1, FAR2))


@jit
def update_tile(p, g, m0, m1, m2, scalars, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The update on a tile: m0 is exp_avg."""
    one_minus_beta1, one_minus_beta2 = tl.load(scalars), tl.load(scalars + 1)
    decay, step_size = tl.load(scalars + 2), tl.load(scalars + 3)
    if OPTIONS & _MAXIMIZE:
        g = -g
    update = lerp(m0, g, one_minus_beta1, OPTIONS & _FAR1)
    sign = tl.where(update > 0.0, 1.0, tl.where(update < 0.0, -1.0, 0.0))
    p = fma(sign + update * 0.0, step_size, p * decay)
    return p, lerp(m0, g, one_minus_beta2, OPTIONS & _FAR2), m1, m2
