"""The order of dimensions that a parameter's blocks follow, stored with them as a number.

Elements share a scale, or bytes, with their neighbours in memory. A checkpoint may lose the layout
of a tensor: loaders copy element by element into tensors of another layout, safetensors stores
contiguous tensors only, and codes that share bytes have no strides of their own. So the order is an
entry of the state, and is saved with the codes: 0-d int64, the rank of the order among all
permutations of the dimensions in lexicographic order (its Lehmer code), 0 for contiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import factorial
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.state.layout import Declaration, storage_order

__all__ = ["DIM_ORDER", "follows_order", "order_entry", "order_in", "order_of"]

#: its key in the state of a parameter
DIM_ORDER = "dim_order"


def follows_order(param: Tensor, stored: Iterable[Declaration]) -> bool:
    """Whether a parameter's components depend on the order of its elements in memory."""
    return param.dim() > 1 and any(
        not component.per_element for declared in stored for component in declared.components
    )


def order_entry(param: Tensor) -> Tensor:
    """The entry for state with the layout of ``param``."""
    left, number = list(range(param.dim())), 0
    for dimension in storage_order(param):
        rank = left.index(dimension)
        number += rank * factorial(len(left) - 1)
        del left[rank]
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def order_of(where: str, entry: Any, dims: int) -> tuple[int, ...]:
    """The dimensions, from the slowest to the fastest, that an entry stands for.

    Raises:
        ValueError: it is not an entry for that many dimensions.
    """
    number = -1
    if isinstance(entry, Tensor) and entry.numel() == 1 and not entry.is_meta:
        entry = entry.item()
    if isinstance(entry, int):
        number = entry
    if not 0 <= number < factorial(dims):
        raise ValueError(
            f"{where}[{DIM_ORDER!r}]={entry!r}: must be from 0 to {factorial(dims) - 1} for "
            f"{dims} dimensions"
        )
    left, order = list(range(dims)), []
    for count in range(dims - 1, -1, -1):
        rank, number = divmod(number, factorial(count))
        order.append(left.pop(rank))
    return tuple(order)


def order_in(
    where: str, param: Tensor, state: Mapping[str, Any], keys: Iterable[str]
) -> tuple[int, ...] | None:
    """The order of dimensions that a parameter's state follows, or None if nothing tells it.

    It is that of the entry, or else of the first component in ``keys`` of the parameter's shape.

    Raises:
        ValueError: the entry is not one for the parameter's dimensions.
    """
    if DIM_ORDER in state:
        return order_of(where, state[DIM_ORDER], param.dim())
    codes = (state[key] for key in keys)
    like = next((c for c in codes if isinstance(c, Tensor) and c.shape == param.shape), None)
    return None if like is None else storage_order(like)
