"""Checks of param groups: that formats can hold the moments, and the engine can step the tensors.

Kernels and compiled loops read and write a tensor at its address, so it must have plain memory of
its own. Tensor subclasses that handle torch's operations themselves do not: quantized weights of
other libraries, ``MaskedTensor``, ``FakeTensor``. Of a ``DTensor`` the local shard has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs import checks
from optstate_codecs.flat_params import is_flat
from optstate_codecs.formats import Format
from optstate_codecs.rules import Moment
from optstate_codecs.sharding import check_placements, is_distributed, local_of

__all__ = [
    "check_formats",
    "check_group_params",
    "check_kind",
    "check_param",
    "check_params",
    "check_steppable",
]

PARAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, Parameter)
# the wrapper steps parameters of any class, since torch's own operations do the arithmetic
WRAP = "use optstate_wrap.wrap(torch.optim.AdamW(...)), which works with FSDP2"


def check_kind(name: str, tensor: Tensor, instead: str = WRAP) -> None:
    """Raise unless a tensor has plain memory.

    Args:
        name: of the tensor, for the message.
        tensor: of any class.
        instead: the alternative suggested to users of a ``DTensor``.

    Raises:
        TypeError: it has no plain memory.
    """
    kind = type(tensor)
    if kind in _PLAIN:
        if tensor.is_nested:
            raise TypeError(f"{name}: is a nested tensor, must be dense")
        return
    if is_distributed(tensor):
        placements = ", ".join(map(str, getattr(tensor, "placements", ())))
        raise TypeError(
            f"{name}: is a DTensor with placements ({placements}), must be a plain tensor; "
            f"{instead}"
        )
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        advice = WRAP if not hasattr(tensor, "fake_mode") else "use device='meta'"
        raise TypeError(
            f"{name}: is a {kind.__name__}, a subclass of Tensor that handles operations itself, "
            f"must be a plain tensor; {advice}"
        )


def check_param(name: str, param: Tensor) -> None:
    """Raise unless a parameter, or the local shard of a ``DTensor``, has plain memory.

    Raises:
        TypeError: it has no plain memory, or is a partial sum.
    """
    if type(param) not in _PLAIN and is_distributed(param):
        check_placements(name, param)
        param = local_of(param)
    check_kind(name, param)


def check_steppable(index: int, param: Tensor) -> None:
    """Raise unless a step can write parameter number ``index``, counted over all groups.

    Raises:
        TypeError, ValueError, RuntimeError: it cannot; the message names it.
    """
    name = f"parameter {index}"
    check_param(name, param)
    if type(param) not in _PLAIN:
        param = local_of(param)
    # the most common layout first
    if not param.is_contiguous() and _overlaps(param):
        raise ValueError(
            f"{name}: shape {tuple(param.shape)} with strides {param.stride()}, so that several "
            "elements share one place in memory; each must have its own, as after .clone()"
        )
    if param.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name}: was made under torch.inference_mode(), so it cannot be changed outside; "
            "make it outside, or a .clone() of it"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory as after ``expand``; torch checks for the same."""
    return any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


class HasGroups(Protocol):
    """An optimizer of any kind."""

    param_groups: list[dict[str, Any]]


def check_params(optimizer: HasGroups) -> None:
    """Raise unless every parameter of an optimizer has plain memory.

    Parameters are checked when a group is added, but may be replaced later: trainers do that when
    they shard a model after creating its optimizer.
    """
    params = (param for group in optimizer.param_groups for param in group["params"])
    for index, param in enumerate(params):
        check_param(f"parameter {index}", param)


def check_formats(moments: Sequence[Moment], formats: Mapping[str, Format]) -> None:
    """Raise unless every moment's format can hold that moment.

    Raises:
        TypeError, ValueError: a format cannot; the message names it.
    """
    for moment in moments:
        format = formats[moment.name]
        checks.whole_number(f"formats[{moment.name!r}]: min_elements", format.min_elements)
        if not moment.signed and not format.keeps_positive:
            raise ValueError(
                f"formats[{moment.name!r}]={format.spec!r}: rounds small second moments to "
                "zero, which makes steps of thousands x lr; use an unsigned format"
            )
        if moment.signed and not format.keeps_sign:
            raise ValueError(
                f"formats[{moment.name!r}]={format.spec!r}: holds no negative numbers; "
                "use a signed format"
            )


def check_group_params(params: Sequence[Tensor], max_grad_norm: float | None) -> None:
    """Raise unless a group may hold these tensors.

    Args:
        params: the tensors.
        max_grad_norm: of the optimizer; the shards of FSDP1 cannot be clipped by it.

    Raises:
        TypeError, ValueError: a tensor is unsuitable; the message names it.
    """
    for i, param in enumerate(params):
        check_param(f"params[{i}]", param)
        if max_grad_norm is not None and is_flat(param):
            raise ValueError(
                f"max_grad_norm={max_grad_norm}: must be None for FSDP1, whose norm is "
                "that of all shards; call clip_grad_norm_ of the model"
            )
        if param.dtype not in PARAM_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in PARAM_DTYPES)
            raise TypeError(f"params[{i}]: dtype {param.dtype}, must be one of {allowed}")
        if param.layout != torch.strided:
            raise TypeError(f"params[{i}]: layout {param.layout}, must be dense")
