"""Correctly rounded square root and multiply-add, and tests of how torch rounds its own.

On x86 processors ``torch.sqrt`` calls MKL, whose result is off by an ulp for a fifth of all
numbers. Torch's multiply-add rounds once or twice, depending on the instruction set that its loops
use (``ATEN_CPU_CAPABILITY`` selects it). Formats call the operations here, so that codes are the
same on every processor. Rules with float32 moments follow ``torch.optim`` and so torch's rounding;
compiled kernels find out here which that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType

import numpy
import torch
from torch import Tensor

__all__ = [
    "TAIL",
    "WHOLE",
    "count_name",
    "multiply_add",
    "recorded",
    "rounds_once",
    "row_counts",
    "row_sums",
    "sqrt",
    "sqrt_is_exact",
]

#: the inputs by name while operations are traced for a compiled kernel; else empty
recorded: ContextVar[Mapping[str, Tensor]] = ContextVar("recorded", default=MappingProxyType({}))

# element counts that torch computes in whole vectors, and one by one
WHOLE, TAIL = 1024, 7


def sqrt(x: Tensor) -> Tensor:
    """The square root of each element, rounded once; a new tensor."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        # these tensors have no memory that numpy could read
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
        out: receives the result; None: a new tensor.
    """
    start = torch.full((), offset, dtype=torch.float32, device=x.device)
    on_host = x.device.type == "cpu" and not (recorded.get() or torch.compiler.is_compiling())
    if on_host and not (rounds_once("add") and rounds_once("add", TAIL)):
        return _in_double(x, factor, start, out)
    return torch.add(start, x, alpha=factor, out=out)


def _in_double(x: Tensor, factor: float, start: Tensor, out: Tensor | None) -> Tensor:
    """``multiply_add`` in float64, where a product of float32 numbers is exact."""
    product = x.double() * float(torch.tensor(factor, dtype=torch.float32, device="cpu"))
    other = start.double()
    total = product + other
    # where the sum is inexact (Knuth's two-sum), round it to odd, so that no tie is rounded twice
    other_part = total - product
    error = (product - (total - other_part)) + (other - other_part)
    bits = total.view(torch.int64)
    towards = ((error > 0) == (total > 0)).to(torch.int64) * 2 - 1
    # the error of an infinite sum is NaN
    odd = torch.where((error.abs() > 0) & (bits & 1 == 0), bits + towards, bits)
    result = odd.view(torch.float64).to(torch.float32)
    return result if out is None else out.copy_(result)


def row_sums(x: Tensor) -> Tensor:
    """The sum of each row of a matrix, [rows, 1], in the same order on every device."""
    if recorded.get():
        return x.sum(1, keepdim=True)  # kernels add in the order below
    while (columns := x.shape[1]) > 1:
        half = columns // 2
        # add the second half to the first; the middle one of an odd number stays
        x = torch.cat([x[:, :half] + x[:, columns - half :], x[:, half : columns - half]], 1)
    return x


def row_counts(x: Tensor, size: int) -> Tensor:
    """How many elements of flat ``x`` each row of ``size`` has, [rows, 1]; the last has fewer."""
    if given := recorded.get():
        return given[count_name(size)]
    counts = torch.full((-(-x.numel() // size), 1), size, dtype=x.dtype, device=x.device)
    if tail := x.numel() % size:
        counts[-1] = tail
    return counts


def count_name(size: int) -> str:
    """The input of a kernel that has ``row_counts`` for rows of ``size``."""
    return f"count{size}"


@cache
def sqrt_is_exact() -> bool:
    """Whether ``torch.sqrt`` is correctly rounded on the host."""
    x = _numbers(4 * WHOLE, 0).abs()
    return torch.equal(x.sqrt(), x.double().sqrt().to(torch.float32))


@cache
def rounds_once(operation: str, count: int = WHOLE) -> bool | None:
    """Whether torch's multiply-add on the host rounds only the sum (True), or the product too.

    Args:
        operation: "add" with ``alpha``, "addcmul", or "lerp".
        count: elements of a tensor, ``WHOLE`` or ``TAIL``.

    Returns:
        None where torch rounds in neither way.
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
        # torch starts from the nearer end
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
