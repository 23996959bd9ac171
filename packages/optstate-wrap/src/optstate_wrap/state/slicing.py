"""Slices the state of a whole parameter into the states of its chunks, and joins them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from optstate_wrap.state.param_chunks import Layout, ParamChunk
from optstate_wrap.state.record import Coded, Record, stored_tensor

__all__ = ["chunks_of_lengths", "join_states", "record_numel", "slice_state"]


def join_states(
    states: Sequence[Mapping[str, Any]], chunks: Sequence[ParamChunk], layout: Layout
) -> dict[str, Any]:
    """The state of a whole parameter, from the states of all its chunks.

    Values with an entry per element are concatenated. Of others, the first chunk's is taken.

    Args:
        states: one for each chunk.
        chunks: all chunks of the parameter.
        layout: of the parameter when it was split.
    """
    if len(states) == 1:
        return dict(states[0])
    whole: dict[str, Any] = {}
    for key, value in states[0].items():
        if isinstance(value, Tensor) and value.shape == (chunks[0].stop - chunks[0].start,):
            whole[key] = layout.unflatten(torch.cat([state[key] for state in states]))
        else:
            whole[key] = value
    return whole


def slice_state(
    state: Mapping[str, Any], chunk: ParamChunk, layout: Layout | None = None
) -> dict[str, Any]:
    """The state of one chunk; if the parameter is split, tensors are copied.

    Args:
        state: of the whole parameter.
        chunk: of the parameter.
        layout: of the parameter when it was split; None: its current layout.
    """
    if chunk.parts == 1:
        return dict(state)
    layout = Layout.of(chunk.param) if layout is None else layout
    sliced: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape == layout.shape:
            flat = value.permute(layout.order).reshape(-1)
            sliced[key] = flat[chunk.start : chunk.stop].clone()
        else:
            # each chunk has its own step count
            sliced[key] = value.clone() if isinstance(value, Tensor) else value
    return sliced


def chunks_of_lengths(param: Tensor, lengths: Sequence[int]) -> list[ParamChunk]:
    """Chunks of ``param`` with these numbers of elements; their number and group are 0."""
    if len(lengths) == 1:
        return [ParamChunk(param, 0, 0, 0, param.numel())]
    starts = [0, *accumulate(lengths)]
    return [
        ParamChunk(param, 0, 0, start, start + count, part, len(lengths))
        for part, (start, count) in enumerate(zip(starts, lengths, strict=False))
    ]


def record_numel(record: Record) -> int:
    """Elements of the chunk whose state a record holds."""
    for value in record.values():
        if isinstance(value, Coded):
            return value.numel
        tensor = stored_tensor(value)
        if isinstance(tensor, Tensor) and tensor.dim():
            return tensor.numel()
    return 0
