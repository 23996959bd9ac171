"""Which tensors a launch steps together, and the tables that say where they lie.

A bucket holds the units that one kernel can step: same device, dtypes, formats, rule options,
write and stage, all dense in storage order. Everything but gradient addresses and scalars is built
once and kept until a tensor's identity changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.request import ParamStep, StepRequest
from optstate_codecs.engine.triton.work_tables import work_table
from optstate_codecs.formats import Format
from optstate_codecs.gradients.centralization import centre_shape
from optstate_codecs.rounding import packed_key
from optstate_codecs.writes import MASTER

__all__ = ["COLUMNS", "MOMENT_SLOTS", "Bucket", "build_buckets", "takes"]

# columns of the table of tensors: see triton/kernel.py
COLUMNS = 15
MOMENT_SLOTS = 3
# elements a tile; of those tried on an H200, the fastest without and with blocks to reduce over
TILE = 2048
BLOCKED_TILE = 512
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Bucket:
    """Units that one launch steps, and their tables on the device.

    Attributes:
        param_steps: in the order of the tables.
        places: the place of each unit in the job.
        formats: one a moment, in the rule's order.
        function: the rule's device function and its options.
        deliver: its device function for what is left out, or None.
        grad_dtype: of every gradient.
        rows: blocks a tile.
        block: elements a block.
        aligned: whether addresses and element counts are multiples of 16, so that a thread may
            access 16 bytes at once.
        full: whether tensors end where tiles end, so that a kernel need mask nothing.
        centralized: whether something is subtracted from gradients.
        stage: of all units.
        tensors: int64 [units, COLUMNS].
        work: int32 [tiles, 2], the tensor and the tile's place in it.
    """

    param_steps: list[ParamStep]
    places: list[int]
    formats: tuple[Format, ...]
    function: tuple[Any, int]
    apply_error_feedback: Any
    grad_dtype: torch.dtype
    rows: int
    block: int
    aligned: bool
    full: bool
    centralized: bool
    stage: int
    tensors: Tensor
    work: Tensor


def block_shape(formats: Sequence[Format]) -> tuple[int, int] | None:
    """Rows and elements a row of a tile that suits all ``formats``; None where none does."""
    spans = {format.span for format in formats if format.span > 1}
    if len(spans) > 1:
        return None
    if not spans:
        return 1, TILE
    block = spans.pop()
    return max(1, BLOCKED_TILE // block), block


def build_buckets(request: StepRequest) -> tuple[list[Bucket], list[int]]:
    """Sort the units of a job into buckets.

    Returns:
        The buckets, and the places of the units that are left for the reference path.
    """
    members: dict[Any, list[int]] = {}
    left = []
    for place, (param_step, grad) in enumerate(
        zip(request.param_steps, request.grads, strict=True)
    ):
        function = request.rule.device_function(request.hypers[param_step.group])
        stored = param_step.bound
        formats = tuple(stored[moment.name] for moment in param_step.moments)
        if function is None or not takes(param_step, grad, request.rule.has_error_feedback):
            left.append(place)
        else:
            dtypes = (param_step.param.dtype, grad.dtype)
            devices = (param_step.param.device, param_step.state["step"].device)
            shape = block_shape(formats)
            assert shape is not None
            ends = _aligned(param_step, grad), param_step.param.numel() % (shape[0] * shape[1]) == 0
            centralized = request.grad_means is not None and request.grad_means.starts[place] >= 0
            looks = (param_step.write, shape, ends, centralized, param_step.stage)
            key = (devices, dtypes, formats, function, *looks)
            members.setdefault(key, []).append(place)
    apply_error_feedback = (
        request.rule.device_error_feedback() if request.rule.has_error_feedback else None
    )
    buckets = []
    for (devices, dtypes, formats, function, *looks), places in members.items():
        _, (rows, block), (aligned, full), centralized, stage = looks
        param_steps = [request.param_steps[place] for place in places]
        begins = (
            [request.grad_means.starts[p] for p in places]
            if centralized and request.grad_means
            else None
        )
        tables = _tables(param_steps, formats, rows * block, devices[0], begins)
        buckets.append(
            Bucket(
                param_steps,
                places,
                formats,
                function,
                apply_error_feedback,
                dtypes[1],
                rows,
                block,
                aligned,
                full,
                centralized,
                stage,
                *tables,
            )
        )
    return buckets, left


def takes(param_step: ParamStep, grad: Tensor, has_error_feedback: bool = False) -> bool:
    """Whether the kernel can step this unit; ``has_error_feedback`` is its rule's."""
    stored = param_step.bound
    formats = [stored[moment.name] for moment in param_step.moments]
    param, functions = param_step.param, [f.device_functions for f in formats]
    return (
        len(formats) <= MOMENT_SLOTS
        and all(function is not None for function in functions)
        and not any(f.in_update_units for f in formats[1:])
        and block_shape(formats) is not None
        and (not has_error_feedback or (functions[0] is not None and functions[0].returns))
        and param.dtype in PARAM_DTYPES
        and grad.dtype in PARAM_DTYPES
        and param_step.in_one_order(grad)
    )


def _aligned(param_step: ParamStep, grad: Tensor) -> bool:
    addresses = [
        param_step.param.data_ptr(),
        grad.data_ptr(),
        *(p.data_ptr() for p in param_step.parts),
    ]
    return param_step.param.numel() % 16 == 0 and all(address % 16 == 0 for address in addresses)


def _tables(
    param_steps: Sequence[ParamStep],
    formats: Sequence[Format],
    tile: int,
    device: torch.device,
    means: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """The tables ``tensors`` and ``work`` of a bucket."""
    table, tiles = [], []
    for number, param_step in enumerate(param_steps):
        row = [param_step.param.numel(), param_step.param.data_ptr()]
        for moment, format in zip(param_step.moments, formats, strict=True):
            parts = [param_step.state[c.key(moment.name)].data_ptr() for c in format.components]
            row += [parts[0], parts[-1]]
        row += [0] * (2 + 2 * MOMENT_SLOTS - len(row))
        row += [packed_key(param_step.seed, param_step.index, word) for word in (0, 1)]
        corrections = [
            param_step.state[c.key(MASTER)].data_ptr() for c in param_step.write.components
        ]
        row += corrections or [0]
        row += [means[number], *centre_shape(param_step.param)] if means else [0, 1, 1]
        row.append(param_step.offset)
        table.append(row)
        tiles.append(-(-param_step.param.numel() // tile))
    tensors = torch.tensor(table, dtype=torch.int64, device="cpu").to(device)
    return tensors, work_table(tiles, device)
