"""Validation of a param group: the formats of its moments, and the tensors that it may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.flat_params import is_flat
from optstate_codecs.formats import Format
from optstate_codecs.param_checks import check_kind
from optstate_codecs.rules import Moment

__all__ = ["check_formats", "check_group_params"]

PARAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        check_kind(f"params[{i}]", param)
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
