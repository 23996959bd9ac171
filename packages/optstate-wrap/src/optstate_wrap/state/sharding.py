"""Sharded parameters: the local shard of a ``DTensor``, and a ``DTensor`` from a local shard."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["local_of", "rewrapped"]


def local_of(tensor: Tensor) -> Tensor:
    """The local shard of a ``DTensor``; any other tensor itself."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def rewrapped(local: Tensor, like: Any) -> Tensor:
    """``local`` as the local shard of a ``DTensor`` sharded like ``like``, if that is one."""
    if like is None or not hasattr(like, "to_local"):
        return local
    from torch.distributed.tensor import DTensor

    sharded: Tensor = DTensor.from_local(
        local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return sharded
