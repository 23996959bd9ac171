"""Sharded parameters: the local shard of a ``DTensor``, and a ``DTensor`` from a local shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optstate_codecs.formats import Format
from optstate_codecs.sharding import shard_formats

__all__ = ["local_of", "needs_whole", "rewrapped", "shared_formats"]


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


def shared_formats(formats: Mapping[str, Format], param: Tensor) -> dict[str, Format]:
    """Formats whose blocks no border between the shards of ``param`` cuts, see ``shard_formats``.

    Formats that need the whole tensor are unchanged.
    """
    whole = {key: format for key, format in formats.items() if needs_whole(format, param)}
    return whole | shard_formats({k: f for k, f in formats.items() if k not in whole}, param)


def needs_whole(format: Format, param: Tensor) -> bool:
    """Whether a format stores tensors of this shape only as wholes, so that a shard is one."""
    return format.for_shape(param.shape, range(param.dim())).whole
