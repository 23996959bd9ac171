"""What rules are made of, for scalars that are numbers and for those that are 0-d tensors.

The operations are those of ``torch.optim``'s single-tensor paths, so that numbers give its bits;
with tensors they are the same up to what ``torch`` has no ``alpha`` or ``value`` for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optstate_codecs.rules.base import Scalar, host_scalar

__all__ = [
    "add_quotient",
    "add_scaled",
    "add_scaled_",
    "average_square_",
    "decayed",
    "far",
    "root_folded",
]


def add_scaled(value: Tensor, other: Tensor, factor: Scalar) -> Tensor:
    """``value + factor * other``, rounded once."""
    if isinstance(factor, Tensor):
        return torch.addcmul(value, other, factor)
    return value.add(other, alpha=factor)


def add_scaled_(value: Tensor, other: Tensor, factor: Scalar) -> None:
    """``add_scaled``, in place."""
    if isinstance(factor, Tensor):
        value.addcmul_(other, factor)
    else:
        value.add_(other, alpha=factor)


def add_quotient(param: Tensor, numerator: Tensor, denom: Tensor, factor: Scalar) -> None:
    """``param += factor * numerator / denom``."""
    if isinstance(factor, Tensor):
        param.addcdiv_(numerator * factor, denom)
    else:
        param.addcdiv_(numerator, denom, value=factor)


def average_square_(mean: Tensor, grad: Tensor, beta: Scalar, one_minus_beta: Scalar) -> None:
    """``mean = beta * mean + one_minus_beta * grad^2``, in place."""
    mean.mul_(beta)
    if isinstance(one_minus_beta, Tensor):
        mean.addcmul_(grad * one_minus_beta, grad)
    else:
        mean.addcmul_(grad, grad, value=one_minus_beta)


def decayed(param: Tensor, grad: Tensor, decay: Scalar, decoupled: bool) -> Tensor:
    """The gradient after weight decay.

    Decoupled, ``param`` is multiplied by ``decay`` in place; otherwise ``decay`` times ``param``
    is added to the gradient.
    """
    if decoupled:
        if isinstance(decay, Tensor) or decay != 1:
            param.mul_(decay)
        return grad
    if isinstance(decay, Tensor) or decay != 0:
        return add_scaled(grad, param, decay)
    return grad


def far(beta: Scalar) -> bool:
    """Whether ``torch.lerp`` to a running mean starts from its far end: 1 - beta >= 0.5."""
    beta = host_scalar(beta)
    return isinstance(beta, float) and 1 - beta >= 0.5


def root_folded(scalars: Sequence[Scalar]) -> list[Scalar]:
    """``scalars`` without the bias correction's root, so that kernels divide once.

    ``scalars`` end in step_size, bias_correction_sqrt and eps. With r for bias_correction_sqrt,
    step_size a / (sqrt(v) / r + eps) is step_size r a / (sqrt(v) + eps r).
    """
    *others, step_size, bias_correction_sqrt, eps = scalars
    return [*others, step_size * bias_correction_sqrt, eps * bias_correction_sqrt]
