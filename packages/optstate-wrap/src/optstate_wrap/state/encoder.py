"""Splits parameters into chunks and encodes their state as the policy wants at this step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.formats import Format
from optstate_codecs.rounding import Counter
from optstate_codecs.sharding import is_distributed, shard_offset
from optstate_wrap.codecs import as_codec
from optstate_wrap.policies import Policy
from optstate_wrap.state.param_chunks import ParamChunk, split_params
from optstate_wrap.state.record import Record, encode_state
from optstate_wrap.state.sharding import shared_formats

__all__ = ["Encoder"]


@dataclass(eq=False)
class Encoder:
    """The policy and all other settings that decide how state is split and stored.

    Attributes:
        inner: the optimizer.
        policy: which codec stores which state key.
        chunk_size: elements above which a parameter is split.
        seed: keys every random number.
        steps: number of steps taken.
        chunked: whether batches may be stepped one by one; otherwise all chunks are one batch.
        splittable: whether a parameter may be stepped in several chunks.
    """

    inner: Optimizer
    policy: Policy
    chunk_size: int
    seed: int
    steps: int = 0
    chunked: bool = True
    splittable: bool = True

    def split(self) -> list[ParamChunk]:
        """The chunks of all parameters, in order."""
        splittable = self.chunked and self.splittable
        return split_params(self.inner.param_groups, self.chunk_size, splittable)

    def chunks_of(self, param: Tensor) -> list[ParamChunk]:
        """The chunks of a parameter; none if it is not one of the optimizer's."""
        return [chunk for chunk in self.split() if chunk.param is param]

    def formats(self, param: Tensor, state: Mapping[str, Any]) -> dict[str, Format]:
        """The formats that the policy wants after this step, by state key.

        Those of a ``DTensor`` are the same for any number of workers, except of formats that need
        the whole tensor, which store each worker's shard by itself.
        """
        formats: dict[str, Format] = {}
        for key, codec in self.policy.get_codecs(param, state, self.steps).items():
            format = as_codec(codec).stored
            if format is not None and param.numel() >= format.min_elements:
                formats[key] = format
        return shared_formats(formats, param) if is_distributed(param) else formats

    def counter(self, chunk: ParamChunk) -> Counter:
        """The key of the random numbers that encode a chunk after this step.

        Those of a ``DTensor`` are counted from the shard's first element in the global tensor.
        """
        start = chunk.start + shard_offset(chunk.param)
        return Counter(self.seed, self.steps + 1, chunk.number, start)

    def encode(self, chunk: ParamChunk, like: Tensor, state: Mapping[str, Any]) -> Record:
        """The record of a chunk's state, as the policy wants it after this step.

        Args:
            chunk: owner of the state.
            like: the tensor that the optimizer stepped; gives shape and memory order.
            state: as the optimizer left it.
        """
        formats = self.formats(chunk.param, state) if state else {}
        return encode_state(state, like, formats, self.counter(chunk)) if formats else dict(state)
