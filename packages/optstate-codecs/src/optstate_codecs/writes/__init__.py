"""Parameter writes: how a new value is rounded to its parameter's dtype, or split over state."""

from __future__ import annotations

from functools import cache

import torch

from optstate_codecs import checks
from optstate_codecs.plain import plain_value
from optstate_codecs.writes.base import MASTER, Nearest, Stochastic, Write
from optstate_codecs.writes.split import CORRECTION, SplitMaster

__all__ = [
    "CORRECTION",
    "MASTER",
    "WRITES",
    "Nearest",
    "SplitMaster",
    "Stochastic",
    "Write",
    "parameter_write",
    "write_named",
]

WRITES = ("nearest", "stochastic", "split24", "split32")


@cache
def parameter_write(name: str, dtype: torch.dtype) -> Write:
    """The write called ``name`` for parameters of ``dtype``.

    Args:
        name: "nearest"; "stochastic", for bfloat16; "split24" or "split32", for bfloat16 and
            float16. Parameters of other dtypes are rounded to nearest.
        dtype: the parameter's dtype.

    Examples:
        >>> parameter_write("split24", torch.bfloat16).components[0].dtype
        torch.int8
    """
    checks.one_of("write", name, WRITES)
    if name == "stochastic" and dtype == torch.bfloat16:
        return Stochastic(dtype)
    if name.startswith("split") and dtype in (torch.bfloat16, torch.float16):
        return SplitMaster(dtype, bits=int(name.removeprefix("split")))
    return Nearest(dtype)


def write_named(bf16_stochastic_round: bool, master_weight_bits: int | None) -> str:
    """The name of the write that two arguments of an optimizer select.

    Args:
        bf16_stochastic_round: whether bfloat16 parameters are rounded stochastically.
        master_weight_bits: None, or 24 or 32 to keep the rounding error of 16-bit parameters.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, or both are set.

    Examples:
        >>> write_named(bf16_stochastic_round=False, master_weight_bits=24)
        'split24'
    """
    bf16_stochastic_round = checks.flag("bf16_stochastic_round", bf16_stochastic_round)
    master_weight_bits = plain_value(master_weight_bits)
    if master_weight_bits is None:
        return "stochastic" if bf16_stochastic_round else "nearest"
    if type(master_weight_bits) is not int or master_weight_bits not in (24, 32):
        raise ValueError(f"master_weight_bits={master_weight_bits!r}: must be None, 24 or 32")
    if bf16_stochastic_round:
        raise ValueError(
            f"master_weight_bits={master_weight_bits}: must be None with "
            "bf16_stochastic_round=True, since a master weight already keeps the rounding error"
        )
    return f"split{master_weight_bits}"
