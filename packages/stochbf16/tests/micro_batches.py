"""Parameters, backwards that bring them known gradients, and one that fails on its way."""

import pytest
import torch
from torch import Tensor, nn

BF16 = torch.bfloat16


def a_param(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))


def give(*pairs: tuple[Tensor, float | Tensor], **options) -> None:
    """One backward that brings each parameter this gradient."""
    total = sum((p * g).sum().to(p.device, torch.float32) for p, g in pairs)
    assert isinstance(total, Tensor)
    total.backward(**options)


class Bad(torch.autograd.Function):
    """Raises in the backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


def interrupted(good: Tensor, bad: Tensor, value: float = 1.0) -> None:
    """A backward that brings ``good`` its gradient, and then fails on its way to ``bad``."""
    late = Bad.apply(bad).sum()  # what was made first comes last
    with pytest.raises(ArithmeticError, match="on purpose"):
        (late + (good * value).sum()).backward()


def values(*params: Tensor) -> list[float | None]:
    return [None if p.grad is None else float(p.grad.detach().double().mean()) for p in params]


def devices() -> list:
    interpreter = pytest.param("cpu", marks=pytest.mark.interpret, id="interpreter")
    cuda = pytest.param("cuda", marks=pytest.mark.cuda, id="cuda")
    return [pytest.param("cpu", id="cpu"), interpreter, cuda]
