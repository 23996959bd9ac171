"""Launches the step kernel on a bucket: its compile-time arguments, tuning and tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.triton.buckets import COLUMNS, MOMENT_SLOTS, Bucket
from optstate_codecs.engine.triton.dtypes import triton_type
from optstate_codecs.engine.triton.kernel import step_kernel
from optstate_codecs.engine.triton.launcher import Launcher
from optstate_codecs.formats import FP32, Format
from optstate_codecs.formats.base import DeviceFunctions

__all__ = ["launch", "make_launcher"]

# measured on an H200: more elements spill registers, fewer make warps wait at reductions
ELEMENTS_PER_WARP = 512
# registers a thread of kernels that reduce over blocks: fewer spill, more leave too few warps to
# hide the memory's latency. Tiles of one block in 16 bits need the fewest, tiles of several blocks
# the most.
REGISTERS, REGISTERS_NARROW, REGISTERS_ROWS = 80, 72, 96
# with error feedback: for parameters in 16 bits, and for wider ones
REGISTERS_FEEDBACK, REGISTERS_FEEDBACK_WIDE = 96, 128


def kernel_constants(bucket: Bucket) -> dict[str, Any]:
    """The kernel's compile-time arguments and compiler options for a bucket."""
    param_step = bucket.param_steps[0]
    moments = param_step.moments
    chosen: dict[str, Any] = {
        "UPDATE": bucket.function[0],
        "UPDATE_OPTIONS": bucket.function[1],
        "FEEDBACK": bucket.error_feedback,
        "HAS_FEEDBACK": bucket.error_feedback is not None,
        "MOMENTS": len(moments),
    }
    words, even = [param_step.write.uses_random, False], [False, False]
    # elements of one access, the same for all tensors, so that all share one layout
    wide = 16 // param_step.param.dtype.itemsize if bucket.aligned else 1
    for slot in range(MOMENT_SLOTS):
        used = slot < len(moments)
        format: Format = bucket.formats[slot] if used else FP32()
        functions = format.device_functions
        assert functions is not None
        stream = moments[slot].stream if used else 0
        codes = format.components[0]
        first, second = codes.dtype, format.components[-1].dtype
        chosen |= {
            f"LOAD{slot}": functions.load,
            f"STORE{slot}": functions.store,
            f"OPTIONS{slot}": functions.options,
            f"MARKS{slot}": used and functions.marks,
            f"FIRST{slot}": triton_type(first),
            f"SECOND{slot}": triton_type(second),
            f"SQRT{slot}": getattr(format, "domain", "linear") == "sqrt",
            f"STREAM{slot}": stream,
            f"PAIRED{slot}": format.in_pairs,
            f"SPAN{slot}": codes.span,
            f"SHARED{slot}": codes.shared,
            f"DIVISIBLE{slot}": 1
            if codes.shared > 1
            else max(1, wide * first.itemsize // codes.span),
        }
        if used and format.uses_random:
            (even if format.in_pairs else words)[stream // 2] = True
    kept = param_step.write.components
    write = param_step.write.device_functions or DeviceFunctions(None, None)
    return chosen | {
        "RANDOM0": bool(moments) and bucket.formats[0].uses_random,
        "UPDATE_UNITS0": any(f.in_update_units for f in bucket.formats),
        "WORD0": words[0],
        "WORD1": words[1],
        "EVEN0": even[0],
        "EVEN1": even[1],
        "P_TYPE": triton_type(param_step.param.dtype),
        "P_BF16": param_step.param.dtype == torch.bfloat16,
        "G_TYPE": triton_type(bucket.grad_dtype),
        "G_BF16": bucket.grad_dtype == torch.bfloat16,
        "STOCHASTIC": param_step.write.uses_random,
        "SPLIT": bool(kept),
        "READ": write.load,
        "WRITE": write.store,
        "WRITE_OPTIONS": write.options,
        "C_TYPE": triton_type(kept[0].dtype) if kept else None,
        "C_DIVISIBLE": wide * kept[0].dtype.itemsize if kept else 1,
        "DIVISIBLE": 16 if bucket.aligned else 1,
        "WHOLE": 16 if bucket.aligned else 1,
        "ROWS": bucket.rows,
        "BLOCK": bucket.block,
        "FOLD": fold(bucket),
        "FULL": bucket.full,
        "COLUMNS": COLUMNS,
        "CENTRALIZED": bucket.centralized,
        **tuning(bucket),
    }


def fold(bucket: Bucket) -> int:
    """Pieces of a block that a thread holds: its elements divided by those of one access."""
    wide = 16 // bucket.param_steps[0].param.dtype.itemsize
    # with float32's four pieces accesses would be too short, and slower than without
    if bucket.rows == 1 or wide != 8:
        return 1
    return min(ELEMENTS_PER_WARP // 32, bucket.block) // wide


def tuning(bucket: Bucket) -> dict[str, int]:
    """Compiler options for a bucket's kernel: warps, and registers a thread."""
    chosen = {"num_warps": bucket.rows * bucket.block // ELEMENTS_PER_WARP}
    if any(format.span > 2 for format in bucket.formats):
        dtypes = (bucket.param_steps[0].param.dtype, bucket.grad_dtype)
        narrow = all(dtype.itemsize == 2 for dtype in dtypes)
        if bucket.rows > 1:
            # for packed codes with wider parameters the compiler's own choice is fastest
            packed = any(format.components[0].span > 1 for format in bucket.formats)
            if bucket.error_feedback is not None:
                limit = REGISTERS_FEEDBACK if narrow else REGISTERS_FEEDBACK_WIDE
                return {**chosen, "maxnreg": limit}
            return chosen if packed and not narrow else {**chosen, "maxnreg": REGISTERS_ROWS}
        chosen["maxnreg"] = REGISTERS_NARROW if narrow else REGISTERS
    return chosen


def make_launcher(bucket: Bucket) -> Launcher:
    """The launcher of the step kernel for a bucket."""
    return Launcher(step_kernel, {**kernel_constants(bucket), "enable_fp_fusion": False})


def launch(
    launcher: Launcher,
    bucket: Bucket,
    grads: Tensor,
    scalar_set: Tensor,
    scalars: Tensor,
    means: Tensor | None,
    factor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Step every tile of the bucket in one launch.

    ``launcher`` is ``make_launcher(bucket)``, and ``means`` the device's ``GradMeans.values``.
    ``factor`` is the kernel's ``grad_scale``; ``kernel`` describes the other tables.
    """
    programs = bucket.work.shape[0]
    if not programs:
        return  # tensors without elements
    means = means if bucket.centralized else None
    tables = bucket.work, bucket.tensors, grads, scalar_set, scalars
    launcher(
        programs,
        [*tables, means, factor, found_inf],
        SCALARS=scalars.shape[1],
        HAS_SCALE=factor is not None,
        HAS_FOUND_INF=found_inf is not None,
    )
