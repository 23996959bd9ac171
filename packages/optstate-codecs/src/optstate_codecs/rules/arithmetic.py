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


def add_quotient(param: Tensor, above: Tensor, below: Tensor, factor: Scalar) -> None:
    """``param += factor * above / below``."""
    if isinstance(factor, Tensor):
        param.addcdiv_(above * factor, below)
    else:
        param.addcdiv_(above, below, value=factor)


def average_square_(mean: Tensor, grad: Tensor, beta: Scalar, other: Scalar) -> None:
    """``mean = beta * mean + other * grad^2``, in place; ``other`` is 1 - beta."""
    mean.mul_(beta)
    if isinstance(other, Tensor):
        mean.addcmul_(grad * other, grad)
    else:
        mean.addcmul_(grad, grad, value=other)


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
    """``scalars`` that end in length, root and eps, without the root: kernels divide once.

    length a / (sqrt(v) / root + eps) is length root a / (sqrt(v) + eps root).
    """
    *folded, length, root, eps = scalars
    return [*folded, length * root, eps * root]
