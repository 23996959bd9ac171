"""Convert low-bit Adam state of torchao and bitsandbytes to ``torch.optim``'s layout.

Every optimizer of this package loads that layout and encodes the moments in its own formats:

    optimizer.load_state_dict(from_bitsandbytes(torch.load("optimizer.pt")))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.convert import adam_state_dict

__all__ = ["from_bitsandbytes", "from_torchao"]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# bitsandbytes' names of moments, and the entry in which newer versions wrap the quantized state
BNB_MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
BNB_WRAPPED = "__bnb_optimizer_quant_state__"
BNB_BLOCK = 256


def from_torchao(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state of torchao's ``Adam(W)8bit``, ``Adam(W)4bit`` or ``Adam(W)Fp8``, decoded.

    Args:
        state_dict: the result of their ``state_dict()``. Their tensors decode themselves, so that
            torchao must be installed to unpickle them.

    Returns:
        A state dict in the layout of ``torch.optim.AdamW``, in float32. A second moment that was
        stored as zero for a nonzero first moment becomes the square of the first moment.

    Raises:
        KeyError: an entry is missing; the message names it.
        TypeError, ValueError: an entry is of another type, or wrong.
    """

    def decode(number: Any, state: Mapping[str, Any], group: object) -> dict[str, Tensor]:
        found = {}
        for moment in MOMENTS:
            if moment in state:
                value = state[moment]
                plain = value.dequantize() if hasattr(value, "codes") else value
                found[moment] = plain.to(torch.float32)
            elif moment != "max_exp_avg_sq":
                raise KeyError(f"state_dict['state'][{number!r}]: missing key {moment!r}")
        return found

    return adam_state_dict(state_dict, decode)


def from_bitsandbytes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state of bitsandbytes' block-wise 8-bit ``Adam`` or ``AdamW``, decoded.

    Args:
        state_dict: the result of their ``state_dict()``, with ``state1``, ``qmap1`` and
            ``absmax1`` for the first moment and the same with 2 for the second, wrapped or not.
            Moments that they keep in float32 are accepted too.

    Returns:
        A state dict as from ``from_torchao``.

    Raises:
        KeyError: an entry is missing; the message names it.
        TypeError, ValueError: an entry is of another type, or the number of scales is not one for
            each 256 elements.
    """

    def decode(number: Any, state: Mapping[str, Any], group: object) -> dict[str, Tensor]:
        where = f"state_dict['state'][{number!r}]"
        wrapped = state.get(BNB_WRAPPED, {})
        if not isinstance(wrapped, Mapping):
            raise TypeError(f"{where}[{BNB_WRAPPED!r}]: must be a dict")
        state = {**state, **wrapped}
        found = {}
        for moment, suffix in BNB_MOMENTS.items():
            if f"state{suffix}" not in state:
                raise KeyError(f"{where}: missing key 'state{suffix}'")
            codes = _tensor(where, state, f"state{suffix}")
            if codes.dtype != torch.uint8:
                found[moment] = codes.to(torch.float32)
                continue
            for name in (f"qmap{suffix}", f"absmax{suffix}"):
                if name not in state:
                    raise KeyError(f"{where}: missing key {name!r}; only block-wise state converts")
            scales, table = (_tensor(where, state, f"{n}{suffix}") for n in ("absmax", "qmap"))
            if table.shape != (256,):
                raise ValueError(f"{where}['qmap{suffix}']: {table.numel()} values, must be 256")
            if scales.numel() != -(-codes.numel() // BNB_BLOCK):
                raise ValueError(
                    f"{where}['absmax{suffix}']: {scales.numel()} scales for {codes.numel()} "
                    f"elements, must be one for each {BNB_BLOCK}"
                )
            values = table.to(torch.float32)[codes.flatten().to(torch.int64)]
            scale = scales.to(torch.float32).repeat_interleave(BNB_BLOCK)[: codes.numel()]
            found[moment] = (values * scale).view(codes.shape)
        return found

    return adam_state_dict(state_dict, decode)


def _tensor(where: str, state: Mapping[str, Any], key: str) -> Tensor:
    value = state[key]
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}[{key!r}]={value!r:.80}: must be a tensor")
    return value
