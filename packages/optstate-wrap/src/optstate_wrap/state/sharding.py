"""Formats that suit the shards of a ``DTensor``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from optstate_codecs.formats import Format
from optstate_codecs.sharding import shard_formats

__all__ = ["needs_whole", "shared_formats"]


def shared_formats(formats: Mapping[str, Format], param: Tensor) -> dict[str, Format]:
    """Formats whose blocks no border between the shards of ``param`` cuts, see ``shard_formats``.

    Formats that need the whole tensor are unchanged.
    """
    whole = {key: format for key, format in formats.items() if needs_whole(format, param)}
    return whole | shard_formats({k: f for k, f in formats.items() if k not in whole}, param)


def needs_whole(format: Format, param: Tensor) -> bool:
    """Whether a format stores tensors of this shape only as wholes, so that a shard is one."""
    return format.for_shape(param.shape, range(param.dim())).whole
