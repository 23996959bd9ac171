"""How a new value reaches its parameter: the last of the four choices of an optimizer."""

from __future__ import annotations

from functools import cache

import torch

from optstate_codecs import checks
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
]

WRITES = ("nearest", "stochastic", "split24", "split32")


@cache
def parameter_write(name: str, dtype: torch.dtype) -> Write:
    """The write that ``name`` means for parameters of ``dtype``.

    Args:
        name: "nearest"; "stochastic", for bfloat16; "split24" or "split32", for bfloat16 and
            float16. Parameters of other dtypes are rounded to nearest.
        dtype: of the parameter.

    Example:
        >>> parameter_write("split24", torch.bfloat16).components[0].dtype
        torch.int8
    """
    checks.one_of("write", name, WRITES)
    if name == "stochastic" and dtype == torch.bfloat16:
        return Stochastic(dtype)
    if name.startswith("split") and dtype in (torch.bfloat16, torch.float16):
        return SplitMaster(dtype, bits=int(name.removeprefix("split")))
    return Nearest(dtype)
