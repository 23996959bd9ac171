"""The state of a whole parameter, from the states of its parts and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.state.layout import inverse_order
from optstate_wrap.state.param_chunks import Layout, ParamChunk
from optstate_wrap.state.record import Coded, Record

__all__ = ["chunks_of_lengths", "join_states", "record_numel", "slice_state"]


def join_states(
    states: Sequence[Mapping[str, Any]], chunks: Sequence[ParamChunk], layout: Layout
) -> dict[str, Any]:
    """One state of the states of all ``chunks`` of a parameter.

    What has an entry per element is joined; of anything else all parts have the same.

    Args:
        states: of the chunks.
        chunks: of the parameter.
        layout: that the parameter had when it was split.
    """
    if len(states) == 1:
        return dict(states[0])
    ordered = [layout.shape[d] for d in layout.order]
    whole: dict[str, Any] = {}
    for key, value in states[0].items():
        if isinstance(value, Tensor) and value.shape == (chunks[0].stop - chunks[0].start,):
            flat = torch.cat([state[key] for state in states])
            whole[key] = flat.view(ordered).permute(inverse_order(layout.order))
        else:
            whole[key] = value
    return whole


def slice_state(
    state: Mapping[str, Any], chunk: ParamChunk, layout: Layout | None = None
) -> dict[str, Any]:
    """The state of one part of a parameter whose whole state is given; copies of tensors.

    Args:
        state: of the whole parameter.
        chunk: the part.
        layout: of the parameter, by which ``chunk`` was split; None: that which it has now.
    """
    if chunk.parts == 1:
        return dict(state)
    layout = Layout.of(chunk.param) if layout is None else layout
    part: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape == layout.shape:
            flat = value.permute(layout.order).reshape(-1)
            part[key] = flat[chunk.start : chunk.stop].clone()
        else:
            # each part counts its own steps
            part[key] = value.clone() if isinstance(value, Tensor) else value
    return part


def chunks_of_lengths(param: Tensor, lengths: Sequence[int]) -> list[ParamChunk]:
    """Pieces of a parameter that have ``lengths``; whose places in the optimizer do not matter."""
    if len(lengths) == 1:
        return [ParamChunk(param, 0, 0, 0, param.numel())]
    starts = [0, *accumulate(lengths)]
    return [
        ParamChunk(param, 0, 0, start, start + count, part, len(lengths))
        for part, (start, count) in enumerate(zip(starts, lengths, strict=False))
    ]


def record_numel(record: Record) -> int:
    """Elements of the part that a record is of."""
    for value in record.values():
        if isinstance(value, Coded):
            return value.numel
        tensor = getattr(value, "tensor", value)
        if isinstance(tensor, Tensor) and tensor.dim():
            return tensor.numel()
    return 0
