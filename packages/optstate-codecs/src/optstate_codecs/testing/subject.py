"""Subjects that laws are checked on, trainers with reproducible gradients, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate_codecs.optimizer import CodedOptimizer

__all__ = ["SHAPES", "Subject", "Trainer", "assert_close"]

#: odd, longer than a block, one short of and over a block, one element, none, no dimensions
SHAPES: tuple[tuple[int, ...], ...] = ((61, 83), (4097,), (129,), (1,), (0,), ())


@dataclass(frozen=True)
class Subject:
    """An optimizer under test, with the bounds that its documentation states.

    Attributes:
        name: for test ids.
        make: builds the optimizer from parameters and keyword arguments.
        exact: the ``torch.optim`` class it must equal bit for bit, where its formats are exact.
        near: the class whose exact arithmetic laws 2 and 10 compare with.
        variants: law 1, sets of arguments to check besides weight decay and ``maximize``.
        max_step: law 3, the longest step in units of lr, with second moments of log-normal
            spread sigma 2.
        drift: law 2, the largest distance from exact Adam's of a parameter whose gradient stopped,
            in units of lr.
        error: law 10, the largest relative root mean square difference of three steps from exact
            Adam's.
        gain: law 4, the largest distance from 1 of the updates' gain against exact Adam's.
        device: for the checks.
        rows: laws 2 to 6 step matrices of that many rows, 2, 4 or 8; 1: vectors.
    """

    name: str
    make: Callable[..., CodedOptimizer]
    exact: Callable[..., Optimizer] | None = None
    near: Callable[..., Optimizer] = torch.optim.Adam
    variants: Sequence[Mapping[str, Any]] = ({}, {"amsgrad": True})
    max_step: float = 8.0
    drift: float = 1.0
    error: float = 0.1
    gain: float = 0.005
    device: str = "cpu"
    rows: int = 1

    def shaped(self, flat: Tensor) -> Tensor:
        """A law's vector on the device; a matrix if ``rows`` is above 1."""
        flat = flat.to(self.device)
        return flat if self.rows == 1 else flat.view(self.rows, -1)


def normal(shape: int | Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers on the host, float32 under any defaults of torch."""
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")


class Trainer:
    """Parameters, an optimizer over them, and reproducible gradients.

    Args:
        make: builds the optimizer from a list of parameters.
        shapes: of the parameters.
        dtype: of the parameters.
        device: of the parameters.
        scale: multiplies every gradient.
    """

    def __init__(
        self,
        make: Callable[..., Optimizer],
        shapes: Sequence[Sequence[int]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        scale: float = 1.0,
    ) -> None:
        self.scale = scale
        self.params = [
            Parameter(self._normal(i, shape).to(dtype).to(device)) for i, shape in enumerate(shapes)
        ]
        self.optimizer = make(self.params)
        self.time = 0

    @staticmethod
    def _normal(seed: int, shape: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")

    def gradient(self, index: int) -> Tensor | None:
        """This step's gradient of one parameter; every fifth one is missing."""
        if (self.time + index) % 5 == 4:
            return None
        param = self.params[index]
        value = self._normal(1000 * self.time + index + 7, param.shape) * self.scale
        return value.to(param.dtype).to(param.device)

    def run(self, steps: int) -> Trainer:
        """Take ``steps`` steps and return the trainer."""
        for _ in range(steps):
            for i, param in enumerate(self.params):
                param.grad = self.gradient(i)
            self.optimizer.step()
            self.time += 1
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Copies of every parameter and state tensor, by name."""
        found = {}
        for i, param in enumerate(self.params):
            found[f"param {i}"] = param.detach().clone()
            for key, value in self.optimizer.state.get(param, {}).items():
                found[f"param {i} {key}"] = value.detach().clone()
        return found


def assert_close(name: str, reference: Tensor, got: Tensor, ratio: float) -> None:
    """Raise unless the RMS error of ``got`` is at most ``ratio`` of ``reference``'s RMS."""
    error = (got.double() - reference.double()).norm()
    norm = reference.double().norm()
    if not bool(error <= ratio * norm):
        raise AssertionError(
            f"{name}: relative RMS error {float(error / norm):.3g}, at most {ratio:.3g} allowed"
        )


def assert_same(name: str, reference: dict[str, Any], got: dict[str, Any]) -> None:
    """Raise unless both hold the same tensors under the same names, NaN equal to NaN."""
    if reference.keys() != got.keys():
        raise AssertionError(f"{name}: {sorted(reference)} became {sorted(got)}")
    for key, value in reference.items():
        if value.dtype != got[key].dtype:
            raise AssertionError(f"{name}: {key} is {got[key].dtype}, must be {value.dtype}")
        if not torch.equal(value.nan_to_num(nan=12345.0), got[key].nan_to_num(nan=12345.0)):
            raise AssertionError(f"{name}: {key} differs")
