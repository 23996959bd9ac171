"""The state of a whole parameter, from the states of its parts and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.layout import inverse_order, storage_order
from optstate_wrap.plan import Piece

__all__ = ["cut", "joined"]


def joined(states: Sequence[Mapping[str, Any]], pieces: Sequence[Piece]) -> dict[str, Any]:
    """One state of the states of all ``pieces`` of a parameter.

    What has an entry per element is joined; of anything else all parts have the same.
    """
    if len(states) == 1:
        return dict(states[0])
    param = pieces[0].param
    order = storage_order(param)
    ordered = [param.shape[d] for d in order]
    whole: dict[str, Any] = {}
    for key, value in states[0].items():
        if isinstance(value, Tensor) and value.shape == (pieces[0].stop - pieces[0].start,):
            flat = torch.cat([state[key] for state in states])
            whole[key] = flat.view(ordered).permute(inverse_order(order))
        else:
            whole[key] = value
    return whole


def cut(state: Mapping[str, Any], piece: Piece) -> dict[str, Any]:
    """The state of one part of a parameter whose whole state is given; copies of tensors."""
    if piece.parts == 1:
        return dict(state)
    order = storage_order(piece.param)
    return {
        key: value.permute(order).reshape(-1)[piece.start : piece.stop].clone()
        if isinstance(value, Tensor) and value.dim() and value.shape == piece.param.shape
        else value
        for key, value in state.items()
    }
