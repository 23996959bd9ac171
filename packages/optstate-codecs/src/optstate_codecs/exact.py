"""Operations that round once on every processor, and how torch's own round on this one.

``torch.sqrt`` takes MKL's root on an x86 processor, which is off by an ulp for a fifth of all
numbers, and torch multiplies and adds with one rounding or with two, as the instructions allow that
its loops are built with (``ATEN_CPU_CAPABILITY`` chooses among those). Formats call the operations
here, so that codes depend on nothing but numbers. Rules with float32 moments do what
``torch.optim`` does, and compiled loops what the rules do: they ask here what that is.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache

import numpy
import torch
from torch import Tensor

__all__ = [
    "TAIL",
    "WHOLE",
    "multiply_add",
    "recorded",
    "rounds_once",
    "row_sums",
    "sqrt",
    "sqrt_is_exact",
]

#: whether operations are recorded, to be repeated on other numbers
recorded: ContextVar[bool] = ContextVar("recorded", default=False)

# elements that torch steps by whole vectors, and that it steps one by one
WHOLE, TAIL = 1024, 7


def sqrt(x: Tensor) -> Tensor:
    """The square root of each element, rounded once; a new tensor."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        # without memory that numpy could read
        return x.double().sqrt_().to(x.dtype)
    if x.device.type != "cpu" or recorded.get():
        return x.sqrt()
    given = x.detach() if x.requires_grad else x
    with numpy.errstate(invalid="ignore"):
        root = numpy.sqrt(given.numpy())
    return torch.from_numpy(numpy.asarray(root))


def multiply_add(x: Tensor, factor: float, offset: float, out: Tensor | None = None) -> Tensor:
    """``factor * x + offset`` in float32, rounded once.

    Args:
        x: float32.
        factor: rounded to float32 first.
        offset: the same.
        out: where to put it, if not in a new tensor.
    """
    start = torch.full((), offset, dtype=torch.float32, device=x.device)
    asked = x.device.type == "cpu" and not (recorded.get() or torch.compiler.is_compiling())
    if asked and not (rounds_once("add") and rounds_once("add", TAIL)):
        return _in_double(x, factor, start, out)
    return torch.add(start, x, alpha=factor, out=out)


def _in_double(x: Tensor, factor: float, start: Tensor, out: Tensor | None) -> Tensor:
    """``multiply_add`` in float64, where a product of float32 numbers is exact."""
    product = x.double() * float(torch.tensor(factor, dtype=torch.float32, device="cpu"))
    other = start.double()
    total = product + other
    # what the sum leaves out (Knuth's two-sum) makes it odd, so that no tie is rounded twice
    other_part = total - product
    error = (product - (total - other_part)) + (other - other_part)
    bits = total.view(torch.int64)
    towards = ((error > 0) == (total > 0)).to(torch.int64) * 2 - 1
    # the error of an infinite sum is NaN
    odd = torch.where((error.abs() > 0) & (bits & 1 == 0), bits + towards, bits)
    result = odd.view(torch.float64).to(torch.float32)
    return result if out is None else out.copy_(result)


def row_sums(x: Tensor) -> Tensor:
    """The sum of each row of a matrix, [rows, 1], added up in an order that nothing changes."""
    while (columns := x.shape[1]) > 1:
        half = columns // 2
        # the first half and the second; of an odd number, the one between them is left as it is
        x = torch.cat([x[:, :half] + x[:, columns - half :], x[:, half : columns - half]], 1)
    return x


@cache
def sqrt_is_exact() -> bool:
    """Whether ``torch.sqrt`` rounds correctly on the host."""
    x = _numbers(4 * WHOLE, 0).abs()
    return torch.equal(x.sqrt(), x.double().sqrt().to(torch.float32))


@cache
def rounds_once(operation: str, count: int = WHOLE) -> bool | None:
    """Whether torch, where it multiplies and adds on the host, rounds only the sum.

    Args:
        operation: "add" with ``alpha``, "addcmul", or "lerp".
        count: elements of a tensor, ``WHOLE`` or ``TAIL``.

    Returns:
        None where torch does neither that nor round product and sum.
    """
    pieces = (_numbers(WHOLE // count * count, seed) for seed in (1, 2, 3))
    a, b, c = (piece.view(-1, count) for piece in pieces)
    factor = float(torch.tensor(0.3, dtype=torch.float32, device="cpu"))
    if operation == "add":
        got = [x.add(y, alpha=factor) for x, y in zip(a, b, strict=True)]
        start, product = a, b.double() * factor
    elif operation == "addcmul":
        got = [x.addcmul(y, z, value=factor) for x, y, z in zip(a, b, c, strict=True)]
        start, product = a, (b * factor).double() * c
    else:
        got = [x.lerp(y, w) for x, y in zip(a, b, strict=True) for w in (factor, 1 - factor)]
        # from the nearer end
        start = torch.stack([a, b], 1).view(-1, count)
        product = torch.stack([b - a, a - b], 1).view(-1, count).double() * factor
    result = torch.stack(got)
    if torch.equal(result, (start + product).to(torch.float32)):
        return True
    return False if torch.equal(result, start + product.to(torch.float32)) else None


def _numbers(count: int, seed: int) -> Tensor:
    """Float32 numbers of either sign and a few binades."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, count, generator=generator, dtype=torch.float32, device="cpu")
    return normal[0] * torch.exp2(normal[1])
