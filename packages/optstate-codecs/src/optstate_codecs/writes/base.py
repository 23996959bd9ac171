"""The contract of a parameter write, and the two that keep nothing beside the parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optstate_codecs.formats.base import Component, DeviceFunctions
from optstate_codecs.rounding import Draw, stochastic_round_bf16

__all__ = ["MASTER", "Nearest", "Stochastic", "Write"]

#: state keys of a write's components begin with it, as a moment's do with the moment's name
MASTER = "master"


@dataclass(frozen=True)
class Write(ABC):
    """How the parameter of one dtype is read before a step and written after it.

    Attributes:
        dtype: of the parameter.
    """

    dtype: torch.dtype

    @property
    def components(self) -> tuple[Component, ...]:
        """What is kept in the state beside the parameter; zeros mean the parameter as it is."""
        return ()

    @property
    def uses_random(self) -> bool:
        """Whether ``write`` needs a draw."""
        return False

    @property
    def device_functions(self) -> DeviceFunctions | None:
        """How a kernel loads and stores parameter and component, where there is a component.

        ``load(param, component, offsets, mask, OPTIONS)`` returns float32;
        ``store(param, component, x, random, offsets, mask, OPTIONS)`` keeps it.
        """
        return None

    def read(self, old: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """The value that a step starts from; ``old`` itself where it is all there is."""
        return old

    @abstractmethod
    def write(self, value: Tensor, parts: Sequence[Tensor], draw: Draw) -> Tensor:
        """The new parameter, in its dtype.

        Args:
            value: the new values, flat, float32 (float64 for float64 parameters).
            parts: the matching slices of the components; overwritten.
            draw: random numbers of this slice.
        """


@dataclass(frozen=True)
class Nearest(Write):
    """Round to nearest."""

    def write(self, value: Tensor, parts: Sequence[Tensor], draw: Draw) -> Tensor:
        return value.to(self.dtype)


@dataclass(frozen=True)
class Stochastic(Write):
    """Round to bfloat16 up or down, with probabilities that make the mean exact."""

    @property
    def uses_random(self) -> bool:
        return True

    def write(self, value: Tensor, parts: Sequence[Tensor], draw: Draw) -> Tensor:
        return stochastic_round_bf16(value, draw.bits16(value.numel(), value.device))
