"""Adam and AdamW, with AMSGrad.

Adam is Kingma & Ba, arXiv:1412.6980, algorithm 1; AdamW is Loshchilov & Hutter, arXiv:1711.05101,
algorithm 2; AMSGrad is Reddi et al., arXiv:1904.09237, algorithm 2.

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    p = p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

Decoupled decay multiplies p by (1 - lr wd) before the step; coupled decay adds wd p to g. Bias
corrected decay uses lr / (1 - b1^t) for lr, as some implementations do. The operations and their
order are those of ``torch.optim``'s single-tensor path, so that float32 moments give its bits.

``error_feedback`` compensates the error of storing m, e = m - stored m. Stored exactly, e would
enter the next steps with weights b1 + b1^2 + ... = b1 / (1 - b1). Their sum is applied at once:

    p = p - lr * b1 / (1 - b1) * e / (sqrt(v / (1 - b2^t)) + eps)

Unlike other error feedback (Seide et al., Interspeech 2014), this needs no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.plain import PlainFields
from optstate_codecs.rules.arithmetic import add_quotient, average_square_, decayed, far
from optstate_codecs.rules.base import Moment, Rule, Scalar, SquareRoot, host_scalar
from optstate_codecs.triton_lib import constant, fma, jit, lerp, reciprocal, sqrt, tl

__all__ = ["Adam", "AdamHyper"]

# streams 2 and 3 share a random word, so that fp32 parameters need one hash per element
EXP_AVG = Moment("exp_avg", signed=True, stream=2, relative_to="exp_avg_sq")
EXP_AVG_SQ = Moment("exp_avg_sq", signed=False, stream=3)
MAX_EXP_AVG_SQ = Moment("max_exp_avg_sq", signed=False, stream=1)
NAMES = (EXP_AVG.name, EXP_AVG_SQ.name, MAX_EXP_AVG_SQ.name)


@lru_cache(maxsize=8)
def _renamed(names: tuple[str, str, str]) -> tuple[Moment, ...]:
    """Adam's three moments with ``names`` as their state keys."""
    own = dict(zip(NAMES, names, strict=True))
    return tuple(
        replace(
            moment,
            name=own[moment.name],
            relative_to=moment.relative_to and own[moment.relative_to],
            plain=moment.name if own[moment.name] != moment.name else None,
        )
        for moment in (EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ)
    )


@dataclass(frozen=True)
class AdamHyper(PlainFields):
    """Adam's hyper-parameters; creating one validates them.

    Attributes:
        lr: learning rate, at least 0; a float or one-element tensor.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: at least 0.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend instead of descend.
    """

    lr: Scalar
    betas: tuple[Scalar, Scalar]
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative("lr", self.lr)
        checks.betas(self.betas, 2)
        checks.nonnegative("eps", self.eps)
        checks.nonnegative("weight_decay", self.weight_decay)
        checks.flag("amsgrad", self.amsgrad)
        checks.flag("maximize", self.maximize)


@dataclass(frozen=True)
class Adam(Rule):
    """Adam, or AdamW with ``decoupled``.

    Args:
        decoupled: whether weight decay is decoupled.
        error_feedback: whether each step compensates the error of storing the first moment.
        corrected_decay: whether decoupled weight decay is bias corrected.
        names: state keys of the first moment, the second moment and AMSGrad's maximum.
    """

    name: ClassVar[str] = "adam"
    hyper_type = AdamHyper
    in_torch: ClassVar[bool] = True
    decoupled: bool = False
    error_feedback: bool = False
    corrected_decay: bool = False
    names: tuple[str, str, str] = NAMES

    def __post_init__(self) -> None:
        if self.corrected_decay and not self.decoupled:
            raise ValueError("corrected_decay=True: must be False unless decoupled=True")

    @property
    def has_error_feedback(self) -> bool:
        return self.error_feedback

    def defaults(self) -> dict[str, Any]:
        return {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 1e-2 if self.decoupled else 0.0,
            "amsgrad": False,
            "maximize": False,
        }

    def moments(self, hyper: AdamHyper) -> tuple[Moment, ...]:
        return _renamed(self.names)[: 3 if hyper.amsgrad else 2]

    def device_function(self, hyper: AdamHyper) -> tuple[Any, int]:
        options = self.decoupled * DECOUPLED + hyper.amsgrad * AMSGRAD + hyper.maximize * MAXIMIZE
        return update_tile, options + far(hyper.betas[0]) * FAR

    def device_error_feedback(self) -> Any:
        return error_feedback_tile

    def device_row(self, hyper: AdamHyper, step: Scalar) -> list[Scalar]:
        lr, decay = host_scalar(hyper.lr), host_scalar(hyper.weight_decay)
        beta1, beta2 = map(host_scalar, hyper.betas)
        bias_correction_sqrt, step_size = (1 - beta2**step) ** 0.5, lr / (1 - beta1**step)
        scalars = [
            1 - beta1,
            beta2,
            1 - beta2,
            self._decay(lr, step_size, decay),
            step_size * bias_correction_sqrt,
            hyper.eps * bias_correction_sqrt,
        ]
        if self.has_error_feedback:
            scalars.append(lr * bias_correction_sqrt * beta1 / (1 - beta1))
        return scalars

    def _decay(self, lr: Scalar, step_size: Scalar, decay: Scalar) -> Scalar:
        """The factor of the parameter, or for coupled decay the multiple added to the gradient."""
        if not self.decoupled:
            return decay
        return 1 - (step_size if self.corrected_decay else lr) * decay

    def variant(self, hyper: AdamHyper) -> tuple[bool, bool]:
        return hyper.amsgrad, hyper.maximize

    def scalars(self, hyper: AdamHyper, step: Scalar) -> list[Scalar]:
        lr, decay = host_scalar(hyper.lr), host_scalar(hyper.weight_decay)
        beta1, beta2 = map(host_scalar, hyper.betas)
        step_size = lr / (1 - beta1**step)
        scalars = [
            1 - beta1,
            beta2,
            1 - beta2,
            self._decay(lr, step_size, decay),
            -step_size,
            (1 - beta2**step) ** 0.5,
            hyper.eps,
        ]
        if self.has_error_feedback:
            scalars.append(-lr * beta1 / (1 - beta1))
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
        one_minus_beta1, beta2, one_minus_beta2 = scalars[:3]
        decay, step_size, bias_correction_sqrt, eps = scalars[3:7]
        amsgrad, maximize = variant
        if maximize:
            grad = -grad
        grad = decayed(param, grad, decay, self.decoupled)

        exp_avg, exp_avg_sq = moments[self.names[0]], moments[self.names[1]]
        exp_avg.lerp_(grad, one_minus_beta1)
        average_square_(exp_avg_sq, grad, beta2, one_minus_beta2)
        if amsgrad:
            max_exp_avg_sq = moments[self.names[2]]
            exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)

        denom = (square_root(exp_avg_sq) / bias_correction_sqrt).add_(eps)
        add_quotient(param, exp_avg, denom, step_size)

    def apply_error_feedback(
        self,
        param: Tensor,
        residual: Tensor,
        moments: Mapping[str, Tensor],
        scalars: Sequence[Scalar],
        variant: tuple[bool, bool],
        square_root: SquareRoot = torch.sqrt,
    ) -> None:
        bias_correction_sqrt, eps, step_size = scalars[5:]
        exp_avg_sq = moments[self.names[2 if variant[0] else 1]]
        denom = (square_root(exp_avg_sq) / bias_correction_sqrt).add_(eps)
        add_quotient(param, residual, denom, step_size)


DECOUPLED, AMSGRAD, MAXIMIZE, FAR = 1, 2, 4, 8
_DECOUPLED, _AMSGRAD = constant(DECOUPLED), constant(AMSGRAD)
_MAXIMIZE, _FAR = constant(MAXIMIZE), constant(FAR)


@jit
def update_tile(p, g, m0, m1, m2, scalars, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The update on a tile: m0 is exp_avg, m1 exp_avg_sq, m2 max_exp_avg_sq.

    ``scalars`` hold the bias corrections: lr sqrt(1 - b2^t) / (1 - b1^t) and eps sqrt(1 - b2^t).
    """
    one_minus_beta1 = tl.load(scalars)
    beta2, one_minus_beta2 = tl.load(scalars + 1), tl.load(scalars + 2)
    decay, step_size, eps = tl.load(scalars + 3), tl.load(scalars + 4), tl.load(scalars + 5)
    if OPTIONS & _MAXIMIZE:
        g = -g
    if OPTIONS & _DECOUPLED:
        p = p * decay
    else:
        g = fma(p, decay, g)
    m0 = lerp(m0, g, one_minus_beta1, OPTIONS & _FAR)
    m1 = fma(g * one_minus_beta2, g, m1 * beta2)
    exp_avg_sq = m1
    if OPTIONS & _AMSGRAD:
        m2 = tl.where((m1 > m2) | (m1 != m1), m1, m2)
        exp_avg_sq = m2
    p = fma(m0 * -step_size, reciprocal(sqrt(exp_avg_sq) + eps), p)
    return p, m0, m1, m2


@jit
def error_feedback_tile(m1, m2, scalars, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The factor of ``Adam.apply_error_feedback`` on a tile."""
    eps, step_size = tl.load(scalars + 5), tl.load(scalars + 6)
    exp_avg_sq = m2 if OPTIONS & _AMSGRAD else m1
    return -step_size * reciprocal(sqrt(exp_avg_sq) + eps)
