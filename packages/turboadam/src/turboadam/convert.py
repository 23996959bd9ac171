"""Convert state of the other distribution named ``turboadam`` (0.2) to ``torch.optim``'s layout.

Per parameter it stores ``step``, the first moment as ``exp_avg`` or ``ustate``, and the second as
``exp_avg_sq`` or ``v_state``. Codes of b bits are packed from a byte's lowest bit on.

    v_state   one of 2^b levels, evenly spaced in the logarithm between a block's two ``scales``
    ustate    m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), with v as stored: one of four levels
              (-3/2 to 3/2 times ``decode_step``) minus the mean of these levels in its block, plus
              the block's mean
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.convert import adam_state_dict

__all__ = ["from_turboadam"]

# second moments start from about this value there, so that it means zero
NOTHING = 2e-30


def from_turboadam(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state of ``turboadam`` 0.2's ``TurboAdam``, decoded.

    Args:
        state_dict: the result of its ``state_dict()``.

    Returns:
        A state dict in the layout of ``torch.optim.AdamW``, in float32. Where the second moment
        means that there was no gradient, both moments are zero. Where its root is below ``eps``,
        the first moment is clamped to the largest that this second moment allows.

    Raises:
        KeyError: an entry is missing; the message names it.
        TypeError, ValueError: an entry is of another type, or wrong.

    Examples:
        >>> optimizer.load_state_dict(from_turboadam(torch.load("optimizer.pt")))
    """
    return adam_state_dict(state_dict, _decoded)


def _decoded(number: Any, state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Tensor]:
    where = f"state_dict['state'][{number!r}]"
    for plain, packed in (("exp_avg", "ustate"), ("exp_avg_sq", "v_state")):
        if plain not in state and packed not in state:
            raise KeyError(f"{where}: missing key {packed!r}, or {plain!r}")
    (beta1, beta2), step = group["betas"], float(state["step"])
    second = _second_moment(state["v_state"]) if "v_state" in state else state["exp_avg_sq"].float()
    if "ustate" not in state:
        return {"exp_avg": state["exp_avg"].float(), "exp_avg_sq": second}

    update = _update_units(state["ustate"]).view(second.shape)
    root = second.sqrt()
    corrected = root / math.sqrt(1 - beta2**step) if step else root
    first = update * (1 - beta1**step) * (corrected + group["eps"])
    ratio = beta1**2 / beta2 if beta2 else math.inf
    if ratio < 1:
        # by the Cauchy-Schwarz inequality
        bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio)) * root
        clamped = first.clamp(-bound, bound)
        first = torch.where(corrected < group["eps"], clamped, first)
    known = second > NOTHING
    return {"exp_avg": first * known, "exp_avg_sq": second * known}


def _codes(packed: Tensor, bits: int) -> Tensor:
    """Unpack codes of ``bits`` bits to float32, with the padding of the last block."""
    options: dict[str, Any] = {"dtype": torch.int64, "device": packed.device}
    bit_values = (packed.reshape(-1, 1) >> torch.arange(8, **options)) & 1
    weights = 1 << torch.arange(bits, **options)
    codes: Tensor = (bit_values.view(-1, bits) * weights).sum(1)
    return codes.to(torch.float32)


def _second_moment(state: Mapping[str, Any]) -> Tensor:
    bits, scales = int(state["n_bits"]), state["scales"].float()
    if not 1 <= bits <= 8:
        raise ValueError(f"v_state: n_bits={bits}: must be from 1 to 8")
    fraction = _codes(state["indices"], bits).view(len(scales), -1) / (2**bits - 1)
    low, high = scales[:, :1], scales[:, 1:]
    values = torch.exp(low + fraction * (high - low))
    return values.view(-1)[: int(state["original_length"])].view(tuple(state["original_shape"]))


def _update_units(state: Mapping[str, Any]) -> Tensor:
    numel, size = int(state["original_numel"]), int(state["mean_block_size"])
    means = state["means"].float().reshape(-1, 1)
    # before anything of that size is made
    if numel < 0 or size < 1 or means.numel() != -(-numel // size):
        raise ValueError(
            f"ustate: {means.numel()} means of {size} elements each for {numel} elements"
        )
    if numel > 4 * state["codes"].numel():
        raise ValueError(f"ustate: {state['codes'].numel()} bytes of codes for {numel} elements")
    levels = (_codes(state["codes"], 2) - 1.5) * state["decode_step"].float()
    indices = torch.arange(means.numel() * size, dtype=torch.int64, device=means.device)
    valid = (indices < numel).view(-1, size)
    levels = levels[: valid.numel()].view_as(valid) * valid
    levels = levels - levels.sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    update: Tensor = (means + levels).view(-1)[:numel]
    return update
