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
from optstate_codecs.sharding import local_of
from optstate_codecs.views import decode_state

__all__ = ["SHAPES", "Subject", "Trainer", "assert_close"]

#: odd, longer than a block, one short of and over a block, one element, none, no dimensions
SHAPES: tuple[tuple[int, ...], ...] = ((61, 83), (4097,), (129,), (1,), (0,), ())


@dataclass(frozen=True)
class Subject:
    """An optimizer under test, with the bounds that its documentation states.

    Attributes:
        name: for test ids.
        make: builds the optimizer from parameters and keyword arguments; one of the family, or a
            wrapper whose ``state`` shows decoded moments.
        exact: the ``torch.optim`` class it must equal bit for bit, where its formats are exact.
        near: the class whose exact arithmetic laws 2 and 10 compare with; None: none has it, and
            these parts of the laws are left out, as for parameters of 16 bits.
        reference: law 7, builds the optimizer whose bits it must have, on the CPU.
        mismatches: law 7, the share of codes that may differ by one level; 0: every bit is equal.
        variants: law 1, sets of arguments to check besides weight decay and ``maximize``.
        max_step: law 3, the longest step in units of lr, with second moments of log-normal
            spread sigma 2.
        drift: law 2, the largest distance from exact Adam's of a parameter whose gradient stopped,
            in units of lr.
        error: law 10, the largest relative root mean square difference of three steps from exact
            Adam's.
        gain: law 4, the largest distance from 1 of the updates' gain against exact Adam's.
        device: for the checks.
        dtype: of the parameters and gradients.
        mesh: of one device; parameters are then DTensors on it, sharded along the first dimension.
        rows: laws 2 to 6 step matrices of that many rows, 2, 4 or 8; 1: vectors.
    """

    name: str
    make: Callable[..., Any]
    exact: Callable[..., Optimizer] | None = None
    near: Callable[..., Optimizer] | None = torch.optim.Adam
    reference: Callable[..., Any] | None = None
    mismatches: float = 0.0
    variants: Sequence[Mapping[str, Any]] = ({}, {"amsgrad": True})
    max_step: float = 8.0
    drift: float = 1.0
    error: float = 0.1
    gain: float = 0.005
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    mesh: Any = None
    rows: int = 1

    @property
    def wide(self) -> bool:
        """Whether parameters have 32 bits or more, so that steps are not lost in their rounding."""
        return self.dtype.itemsize >= 4

    def shaped(self, flat: Tensor) -> Tensor:
        """A law's vector on the device; a matrix if ``rows`` is above 1."""
        flat = flat.to(self.device)
        return flat if self.rows == 1 else flat.view(self.rows, -1)

    def parameter(self, flat: Tensor) -> Parameter:
        """A parameter of these numbers."""
        return Parameter(on_mesh(self.shaped(flat).to(self.dtype, copy=True), self.mesh))

    def gradient(self, flat: Tensor) -> Tensor:
        """A gradient of these numbers for such a parameter."""
        return on_mesh(self.shaped(flat).to(self.dtype), self.mesh)

    def trainer(
        self,
        make: Callable[..., Any] | None = None,
        shapes: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> Trainer:
        """A trainer of the subject, or of ``make``; ``options`` of ``Trainer``."""
        known = {"dtype": self.dtype, "device": self.device, "mesh": self.mesh, **options}
        return Trainer(make or self.make, SHAPES if shapes is None else shapes, **known)


def on_mesh(local: Tensor, mesh: Any) -> Tensor:
    """A DTensor on a mesh of one device, or ``local`` itself without a mesh."""
    if mesh is None:
        return local
    # imported here, since it takes a second
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placement = Shard(0) if local.dim() else Replicate()
    return DTensor.from_local(local, mesh, [placement], run_check=False)


def plain(tensor: Tensor) -> Tensor:
    """The numbers of a parameter or moment, the shard of a DTensor."""
    return local_of(tensor.detach())


def moments_of(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    """The decoded moments of a parameter, by name."""
    coded = isinstance(optimizer, CodedOptimizer)
    state = decode_state(optimizer, param) if coded else optimizer.state[param]
    found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return {key: plain(v) for key, v in found.items() if key != "step" and v.dim() == param.dim()}


def second_moments(optimizer: Any) -> list[str]:
    """The names of the moments that are never negative."""
    if not isinstance(optimizer, CodedOptimizer):
        return ["exp_avg_sq"]
    hyper = optimizer.rule.hyper(optimizer.param_groups[0])
    return [moment.name for moment in optimizer.rule.moments(hyper) if not moment.signed]


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
        mesh: makes them DTensors, see ``Subject``.
    """

    def __init__(
        self,
        make: Callable[..., Optimizer],
        shapes: Sequence[Sequence[int]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        scale: float = 1.0,
        mesh: Any = None,
    ) -> None:
        self.scale, self.mesh = scale, mesh
        starts = [self._normal(i, shape).to(dtype).to(device) for i, shape in enumerate(shapes)]
        self.params = [Parameter(on_mesh(start, mesh)) for start in starts]
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
        return on_mesh(value.to(param.dtype).to(param.device), self.mesh)

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
            found[f"param {i}"] = plain(param).clone()
            for key, value in self.optimizer.state.get(param, {}).items():
                found[f"param {i} {key}"] = plain(value).clone()
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
