"""How a new parameter value reaches the parameter: the last of the four choices of an optimizer."""

from __future__ import annotations

from torch import Tensor, bfloat16

from optstate_codecs import checks
from optstate_codecs.rounding import Draw, stochastic_round_bf16

__all__ = ["WRITES", "round_to_parameter"]

WRITES = ("nearest", "stochastic")


def round_to_parameter(value: Tensor, like: Tensor, write: str, draw: Draw) -> Tensor:
    """Round ``value`` (flat, float32 or float64) to the dtype of ``like``.

    Args:
        value: the new parameter values.
        like: the old ones, in the parameter's dtype.
        write: "nearest", or "stochastic": unbiased, for bfloat16 parameters; parameters of other
            dtypes are rounded to nearest.
        draw: random numbers of this slice.
    """
    checks.one_of("write", write, WRITES)
    if write == "stochastic" and like.dtype == bfloat16:
        return stochastic_round_bf16(value, draw.bits16(value.numel(), value.device))
    return value.to(like.dtype)
