"""How an optimizer's state is cut into chunks and stored, at this point of the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.formats import Format
from optstate_codecs.rounding import Counter
from optstate_wrap.codecs import as_codec
from optstate_wrap.policies import Policy
from optstate_wrap.state.param_chunks import ParamChunk, split_params
from optstate_wrap.state.record import Record, encode_state

__all__ = ["Encoder"]


@dataclass(eq=False)
class Encoder:
    """The policy, and what else decides how state is stored.

    Attributes:
        inner: the optimizer.
        policy: which codec stores which key.
        chunk_size: parameters (elements) above which a tensor is split.
        seed: keys every random number.
        steps: how many have been taken.
        chunked: whether chunks may be stepped one by one; otherwise all are one chunk.
        splittable: whether a tensor may be stepped in parts.
    """

    inner: Optimizer
    policy: Policy
    chunk_size: int
    seed: int
    steps: int = 0
    chunked: bool = True
    splittable: bool = True

    def split(self) -> list[ParamChunk]:
        """Every chunk of every parameter, in order."""
        return split_params(
            self.inner.param_groups, self.chunk_size, self.chunked and self.splittable
        )

    def chunks_of(self, param: Tensor) -> list[ParamChunk]:
        """The chunks that a parameter is stepped in; none where it is not the optimizer's."""
        return [chunk for chunk in self.split() if chunk.param is param]

    def formats(self, param: Tensor, state: Mapping[str, Any]) -> dict[str, Format]:
        """The formats that the policy wants after this step, by key."""
        formats = {}
        for key, codec in self.policy.get_codecs(param, state, self.steps).items():
            format = as_codec(codec).stored
            if format is not None and param.numel() >= format.min_elements:
                formats[key] = format
        return formats

    def counter(self, chunk: ParamChunk) -> Counter:
        """What keys the random numbers with which a chunk is stored after this step."""
        return Counter(self.seed, self.steps + 1, chunk.number, chunk.start)

    def encode(self, chunk: ParamChunk, like: Tensor, state: Mapping[str, Any]) -> Record:
        """The record of a state as the policy wants it after this step.

        Args:
            chunk: that the state is of.
            like: what the optimizer has stepped for it.
            state: as the optimizer has left it.
        """
        formats = self.formats(chunk.param, state) if state else {}
        return encode_state(state, like, formats, self.counter(chunk)) if formats else dict(state)
