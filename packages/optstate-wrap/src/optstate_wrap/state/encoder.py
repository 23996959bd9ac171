"""How an optimizer's state is cut into pieces and stored, at this point of the training."""

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
from optstate_wrap.state.record import Record, encode_state
from optstate_wrap.step.pieces import ParamChunk, pieces

__all__ = ["Encoder"]


@dataclass(eq=False)
class Encoder:
    """The policy, and what else decides how state is stored.

    Attributes:
        inner: the optimizer.
        policy: which codec stores which key.
        chunk: parameters (elements) above which a tensor is split.
        seed: keys every random number.
        steps: how many have been taken.
        chunked: whether chunks may be stepped one by one; otherwise all are one chunk.
        splittable: whether a tensor may be stepped in parts.
    """

    inner: Optimizer
    policy: Policy
    chunk: int
    seed: int
    steps: int = 0
    chunked: bool = True
    splittable: bool = True

    def plan(self) -> list[ParamChunk]:
        """Every piece of every parameter, in order."""
        return pieces(self.inner.param_groups, self.chunk, self.chunked and self.splittable)

    def pieces_of(self, param: Tensor) -> list[ParamChunk]:
        """The pieces that a parameter is stepped in; none where it is not the optimizer's."""
        return [piece for piece in self.plan() if piece.param is param]

    def formats(self, param: Tensor, state: Mapping[str, Any]) -> dict[str, Format]:
        """The formats that the policy wants after this step, by key."""
        formats = {}
        for key, codec in self.policy.get_codecs(param, state, self.steps).items():
            format = as_codec(codec).stored
            if format is not None and param.numel() >= format.min_elements:
                formats[key] = format
        return formats

    def counter(self, piece: ParamChunk) -> Counter:
        """What keys the random numbers with which a piece is stored after this step."""
        return Counter(self.seed, self.steps + 1, piece.number, piece.start)

    def encode(self, piece: ParamChunk, like: Tensor, state: Mapping[str, Any]) -> Record:
        """The record of a state as the policy wants it after this step.

        Args:
            piece: that the state is of.
            like: what the optimizer has stepped for it.
            state: as the optimizer has left it.
        """
        formats = self.formats(piece.param, state) if state else {}
        return encode_state(state, like, formats, self.counter(piece)) if formats else dict(state)
