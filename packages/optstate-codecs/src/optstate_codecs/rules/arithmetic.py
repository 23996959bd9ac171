"""Operations that rules share, for scalars that are numbers or 0-d tensors.

With numbers they are the operations of ``torch.optim``'s single-tensor paths and give its bits.
``alpha`` and ``value`` of torch functions take no tensors, so that tensors need other operations.
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
    """``value += factor * other``, rounded once."""
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
    """Apply weight decay and return the gradient.

    Decoupled decay multiplies ``param`` by ``decay`` in place. Coupled decay adds ``decay`` times
    ``param`` to the gradient, in a new tensor.
    """
    if decoupled:
        if isinstance(decay, Tensor) or decay != 1:
            param.mul_(decay)
        return grad
    if isinstance(decay, Tensor) or decay != 0:
        return add_scaled(grad, param, decay)
    return grad


def far(beta: Scalar) -> bool:
    """Whether 1 - beta >= 0.5, where ``torch.lerp`` computes from its end and not its start."""
    beta = host_scalar(beta)
    return isinstance(beta, float) and 1 - beta >= 0.5


def root_folded(scalars: Sequence[Scalar]) -> list[Scalar]:
    """Fold the bias correction into step size and eps, so that kernels divide once.

    ``scalars`` end with step_size, bias_correction_sqrt and eps. With r for bias_correction_sqrt,
    step_size * a / (sqrt(v) / r + eps) = step_size * r * a / (sqrt(v) + eps * r).
    """
    *others, step_size, bias_correction_sqrt, eps = scalars
    return [*others, step_size * bias_correction_sqrt, eps * bias_correction_sqrt]
