"""Launches the kernel on a bucket: picks its constants and hands over the step's tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optstate_codecs.device import tl
from optstate_codecs.engine.plan import COLUMNS, MOMENT_SLOTS, Bucket
from optstate_codecs.engine.triton.kernel import step_kernel
from optstate_codecs.formats import FP32, Format

__all__ = ["launch"]

# measured on an H200: with more elements registers run out, with fewer warps wait at reductions
ELEMENTS_PER_WARP = 512

# how the kernel sees a stored dtype: bfloat16 as 16-bit integers, so that conversions are ours
_TYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "int16",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
}


def _type(dtype: torch.dtype) -> Any:
    return getattr(tl, _TYPES[dtype])


def constants(bucket: Bucket) -> dict[str, Any]:
    """The kernel's compile-time arguments for a bucket."""
    unit = bucket.units[0]
    moments = unit.moments
    chosen: dict[str, Any] = {
        "UPDATE": bucket.function[0],
        "UPDATE_OPTIONS": bucket.function[1],
        "MOMENTS": len(moments),
    }
    stochastic = unit.write == "stochastic" and unit.param.dtype == torch.bfloat16
    words = [stochastic, False]
    for slot in range(MOMENT_SLOTS):
        used = slot < len(moments)
        format: Format = bucket.formats[slot] if used else FP32()
        functions = format.device_functions
        assert functions is not None
        stream = moments[slot].stream if used else 0
        first, second = format.components[0].dtype, format.components[-1].dtype
        chosen |= {
            f"LOAD{slot}": functions.load,
            f"STORE{slot}": functions.store,
            f"OPTIONS{slot}": functions.options,
            f"FIRST{slot}": _type(first),
            f"SECOND{slot}": _type(second),
            f"SQRT{slot}": getattr(format, "domain", "linear") == "sqrt",
            f"STREAM{slot}": stream,
        }
        if used and format.uses_random:
            words[stream // 2] = True
    # every access covers the same number of elements, so that all tiles share one layout
    wide = 16 // unit.param.dtype.itemsize
    return chosen | {
        "UPDATE_UNITS0": bucket.formats[0].in_update_units,
        "WORD0": words[0],
        "WORD1": words[1],
        "P_TYPE": _type(unit.param.dtype),
        "P_BF16": unit.param.dtype == torch.bfloat16,
        "G_TYPE": _type(bucket.grad_dtype),
        "G_BF16": bucket.grad_dtype == torch.bfloat16,
        "STOCHASTIC": stochastic,
        "DIVISIBLE": 16 if bucket.aligned else 1,
        "STATE_DIVISIBLE": wide if bucket.aligned else 1,
        "WHOLE": 16 if bucket.aligned else 1,
        "ROWS": bucket.rows,
        "BLOCK": bucket.block,
        "COLUMNS": COLUMNS,
    }


def launch(
    bucket: Bucket,
    chosen: dict[str, Any],
    grads: Tensor,
    row_of: Tensor,
    rows: Tensor,
    factor: Tensor | None,
    found_inf: Tensor | None,
    **tuning: int,
) -> None:
    """Step every tile of the bucket in one launch.

    ``factor`` multiplies the gradients; the kernel's ``grad_scale``.
    ``tuning`` goes to the compiler: ``num_warps``, ``maxnreg``.
    """
    if not bucket.work.shape[0]:
        return  # tensors without elements
    step_kernel[(bucket.work.shape[0],)](
        bucket.work,
        bucket.tensors,
        grads,
        row_of,
        rows,
        factor,
        found_inf,
        ROW=rows.shape[1],
        HAS_SCALE=factor is not None,
        HAS_FOUND_INF=found_inf is not None,
        **{"num_warps": bucket.rows * bucket.block // ELEMENTS_PER_WARP, **tuning},
        enable_fp_fusion=False,
        **chosen,
    )
