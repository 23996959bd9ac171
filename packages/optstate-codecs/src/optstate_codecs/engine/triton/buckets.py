"""Buckets: the parameters that one launch steps together, and their tables of addresses.

Parameters of a bucket share device, dtypes, formats, rule options, write and stage, and are dense
in storage order. A bucket is kept between steps, until an address or a layout changes. Gradient
addresses and scalars, which change every step, have tables of their own.
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
from optstate_codecs.gradients.centralization import mean_layout
from optstate_codecs.rounding import packed_key
from optstate_codecs.writes import MASTER

__all__ = ["COLUMNS", "MOMENT_SLOTS", "Bucket", "build_buckets", "takes"]

# columns of ``Bucket.tensors``, see ``kernel``
COLUMNS = 15
MOMENT_SLOTS = 3
# elements a tile without and with blocks to reduce over: the fastest measured on an H200
TILE = 2048
BLOCKED_TILE = 512
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Bucket:
    """Parameters that one launch steps, and their tables on the device.

    Attributes:
        param_steps: in the order of the tables.
        positions: the position of each in the request.
        formats: one a moment, in the rule's order.
        function: the rule's device function and its options.
        error_feedback: the rule's device function for the residual's factor, or None.
        grad_dtype: of every gradient.
        rows: blocks a tile.
        block: elements a block.
        aligned: whether addresses and element counts are multiples of 16, so that a thread may
            access 16 bytes at once.
        full: whether tensors end where tiles end, so that the kernel needs no masks.
        centralized: whether means are subtracted from the gradients.
        stage: of all parameters.
        tensors: int64 [parameters, COLUMNS], see ``kernel``.
        work: int32 [tiles, 2], see ``work_table``.
    """

    param_steps: list[ParamStep]
    positions: list[int]
    formats: tuple[Format, ...]
    function: tuple[Any, int]
    error_feedback: Any
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
    """Blocks a tile and elements a block that suit all ``formats``; None where none do."""
    spans = {format.span for format in formats if format.span > 1}
    if len(spans) > 1:
        return None
    if not spans:
        return 1, TILE
    block = spans.pop()
    return max(1, BLOCKED_TILE // block), block


def build_buckets(request: StepRequest) -> tuple[list[Bucket], list[int]]:
    """Sort the parameters of a request into buckets.

    Returns:
        The buckets, and the positions of the parameters that only the reference can step.
    """
    members: dict[Any, list[int]] = {}
    fallback = []
    pairs = zip(request.param_steps, request.grads, strict=True)
    for position, (param_step, grad) in enumerate(pairs):
        function = request.rule.device_function(request.hypers[param_step.group])
        stored = param_step.bound
        formats = tuple(stored[moment.name] for moment in param_step.moments)
        if function is None or not takes(param_step, grad, request.rule.has_error_feedback):
            fallback.append(position)
        else:
            dtypes = (param_step.param.dtype, grad.dtype)
            devices = (param_step.param.device, param_step.state["step"].device)
            shape = block_shape(formats)
            assert shape is not None
            ends = _aligned(param_step, grad), param_step.param.numel() % (shape[0] * shape[1]) == 0
            centralized = (
                request.grad_means is not None and request.grad_means.starts[position] >= 0
            )
            layout = (param_step.write, shape, ends, centralized, param_step.stage)
            key = (devices, dtypes, formats, function, *layout)
            members.setdefault(key, []).append(position)
    feedback = request.rule.device_error_feedback() if request.rule.has_error_feedback else None
    buckets = []
    for (devices, dtypes, formats, function, *layout), positions in members.items():
        _, (rows, block), (aligned, full), centralized, stage = layout
        param_steps = [request.param_steps[position] for position in positions]
        starts = None
        if centralized and request.grad_means:
            starts = [request.grad_means.starts[p] for p in positions]
        tables = _tables(param_steps, formats, rows * block, devices[0], starts)
        functions = function, feedback if formats else None
        contents = param_steps, positions, formats, *functions, dtypes[1], rows, block
        buckets.append(Bucket(*contents, aligned, full, centralized, stage, *tables))
    return buckets, fallback


def takes(param_step: ParamStep, grad: Tensor, has_error_feedback: bool = False) -> bool:
    """Whether the kernel can step this parameter; ``has_error_feedback`` is its rule's."""
    stored = param_step.bound
    formats = [stored[moment.name] for moment in param_step.moments]
    param, functions = param_step.param, [f.device_functions for f in formats]
    return (
        len(formats) <= MOMENT_SLOTS
        and all(function is not None for function in functions)
        and not any(f.in_update_units for f in formats[1:])
        and block_shape(formats) is not None
        and (not has_error_feedback or all(f is not None and f.returns for f in functions[:1]))
        and param.dtype in PARAM_DTYPES
        and grad.dtype in PARAM_DTYPES
        and param_step.in_one_order(grad)
    )


def _aligned(param_step: ParamStep, grad: Tensor) -> bool:
    tensors = [param_step.param, grad, *param_step.parts]
    return param_step.param.numel() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)


def _tables(
    param_steps: Sequence[ParamStep],
    formats: Sequence[Format],
    tile: int,
    device: torch.device,
    mean_starts: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """The tables ``tensors`` and ``work`` of a bucket."""
    table, tiles = [], []
    for number, param_step in enumerate(param_steps):
        entry = [param_step.param.numel(), param_step.param.data_ptr()]
        for moment, format in zip(param_step.moments, formats, strict=True):
            parts = [param_step.state[c.key(moment.name)].data_ptr() for c in format.components]
            entry += [parts[0], parts[-1]]
        entry += [0] * (2 + 2 * MOMENT_SLOTS - len(entry))
        entry += [packed_key(param_step.seed, param_step.key, word) for word in (0, 1)]
        corrections = [
            param_step.state[c.key(MASTER)].data_ptr() for c in param_step.write.components
        ]
        entry += corrections or [0]
        entry += [mean_starts[number], *mean_layout(param_step.param)] if mean_starts else [0, 1, 1]
        entry.append(param_step.offset)
        table.append(entry)
        tiles.append(-(-param_step.param.numel() // tile))
    tensors = torch.tensor(table, dtype=torch.int64, device="cpu").to(device)
    return tensors, work_table(tiles, device)
