"""The interface of a parameter write, and the two writes without state: nearest, stochastic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optstate_codecs.formats.base import Component, DeviceFunctions
from optstate_codecs.rounding import Draw, stochastic_round_bf16

__all__ = ["MASTER", "Nearest", "Stochastic", "Write"]

#: prefix of the state keys of a write's components, as the name is a moment's
MASTER = "master"


@dataclass(frozen=True)
class Write(ABC):
    """How the parameter of one dtype is read before a step and written after it.

    Attributes:
        dtype: the parameter's dtype.
    """

    dtype: torch.dtype

    @property
    def components(self) -> tuple[Component, ...]:
        """The tensors kept in the state; zeros mean that the value is the parameter itself."""
        return ()

    @property
    def uses_random(self) -> bool:
        """Whether ``write`` needs random numbers."""
        return False

    @property
    def device_functions(self) -> DeviceFunctions | None:
        """How a kernel loads and stores parameter and component; None without a component.

        ``load(param, component, offsets, mask, OPTIONS)`` returns a float32 tile, and
        ``store(param, component, x, random, offsets, mask, OPTIONS)`` stores one.
        """
        return None

    def read(self, old: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """The value that a step starts from; ``old`` itself if there are no components."""
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
    """Round to bfloat16 stochastically: up or down, with probabilities that keep the mean."""

    @property
    def uses_random(self) -> bool:
        return True

    def write(self, value: Tensor, parts: Sequence[Tensor], draw: Draw) -> Tensor:
        return stochastic_round_bf16(value, draw.bits16(value.numel(), value.device))
