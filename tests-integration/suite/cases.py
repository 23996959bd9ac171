"""The cases of the suite: a configuration, a point of the other axes, and a law.

The axes are crossed one at a time from the point that packages' users have: float32 parameters, the
eager reference, state on the device, plain tensors. Some pairs are added that share code.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from optstate_codecs.offloading import offload
from optstate_codecs.testing import LAWS, Subject, exactness, same_bits
from suite.configurations import Configuration
from suite.exclusions import EXCLUSIONS, Exclusion

__all__ = ["ALL_LAWS", "POINTS", "Case", "Point", "every_case", "excluded"]

Law = Callable[[Subject], None]
ALL_LAWS: tuple[Law, ...] = (exactness, *LAWS, same_bits)
#: of the cases beside those of the first point, one in so many is in every run
SHARE = 16
#: one of each kind of state: those for which laws 2 and 4, which take seconds, are in every run
LONG_LAWS = (
    "lowbit_adam.Adam8bit",
    "lowbit_adam.AdamW4bit",
    "lowbit_adam.AdamWFp8",
    "optstate_codecs.CodedOptimizer+Adam+fp32",
    "optstate_wrap.wrap_max_compression_adamw",
    "stochbf16.Adam",
    "turboadam.TurboAdam",
    "turboadam.TurboAdam+3-and-4",
    "turboadam.TurboAdam+6-and-8",
)
# bytes: several chunks for the laws' parameters
CHUNK = 20_000


@dataclass(frozen=True)
class Point:
    """Where and on what a law is checked.

    Attributes:
        dtype: of the parameters.
        backend: "eager", "compile", "triton" in the interpreter or on a GPU.
        store: "device", "host" or "disk".
        layout: "plain", or "dtensor" on a mesh of one process.
        device: "cpu" or "cuda".
    """

    dtype: str = "float32"
    backend: str = "eager"
    store: str = "device"
    layout: str = "plain"
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Every axis; short enough for a test's id."""
        return "-".join((self.dtype, self.backend, self.store, self.layout, self.device))


FIRST = Point()
POINTS = (
    FIRST,
    *(Point(dtype) for dtype in ("bfloat16", "float16", "float64")),
    *(Point(dtype, "compile") for dtype in ("float32", "bfloat16", "float16", "float64")),
    *(Point(dtype, store=store) for dtype in ("float32", "bfloat16") for store in ("host", "disk")),
    *(Point(backend="compile", store=store) for store in ("host", "disk")),
    *(Point(dtype, layout="dtensor") for dtype in ("float32", "bfloat16")),
    Point(backend="compile", layout="dtensor"),
    *(Point(dtype, "triton") for dtype in ("float32", "bfloat16")),
    *(Point(dtype, "triton", device="cuda") for dtype in ("float32", "bfloat16", "float16")),
    *(Point(backend="triton", store=store, device="cuda") for store in ("host", "disk")),
    Point(backend="triton", layout="dtensor", device="cuda"),
)


@dataclass(frozen=True)
class Case:
    """One law for one configuration at one point."""

    configuration: Configuration
    point: Point
    law: Law

    @property
    def name(self) -> str:
        return f"{self.configuration.name}-{self.point.name}-{self.law.__name__}"

    @property
    def interpreted(self) -> bool:
        return self.point.backend == "triton" and self.point.device == "cpu"

    @property
    def lean(self) -> bool:
        """Whether it is in every run, and not only in those of the whole suite."""
        configuration, law = self.configuration, self.law.__name__
        if law == "unbiased_length":
            return configuration.name in LONG_LAWS
        if law == "zero_stays":
            return configuration.name in LONG_LAWS and self.point == FIRST
        first = self.point == FIRST and configuration.public.base is None
        return first or zlib.crc32(self.name.encode()) % SHARE == 0

    @contextmanager
    def subject(self, folder: Path) -> Iterator[Subject]:
        """The subject of the law; files are in ``folder``."""
        point = self.point
        with ExitStack() as stack:
            distributed = point.layout == "dtensor"
            mesh = stack.enter_context(mesh_of_one(point.device)) if distributed else None
            yield Subject(
                self.name,
                self._make(folder),
                device=point.device,
                dtype=getattr(torch, point.dtype),
                mesh=mesh,
                **{**self._reference(), **self.configuration.fields},
            )

    def _reference(self) -> dict[str, Any]:
        """What law 7 compares with."""
        point, make = self.point, self.configuration.make
        if (point.backend, point.store, point.device) == ("eager", "device", "cpu"):
            return {}
        # the interpreter and GPUs round a transcendental in another way
        mismatches = 1e-4 if "triton" in point.name or point.device == "cuda" else 0.0
        return {"reference": partial(make, backend="eager"), "mismatches": mismatches}

    def _make(self, folder: Path) -> Callable[..., Any]:
        make = self.configuration.make
        if self.configuration.coded:
            make = partial(make, backend=self.point.backend)
        if self.point.store == "device":
            return make
        return partial(_offloaded, make, self.point.store, folder, itertools.count())


def _offloaded(
    make: Callable[..., Any],
    store: str,
    folder: Path,
    number: Iterator[int],
    params: Any,
    **options: Any,
) -> Any:
    path = {"path": folder / f"state-{next(number)}"} if store == "disk" else {}
    return offload(make(params, **options), store, chunk_bytes=CHUNK, **path)


@contextmanager
def mesh_of_one(device: str) -> Iterator[Any]:
    """A mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    kind = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device, (1,))
    finally:
        dist.destroy_process_group()


def excluded(case: Case) -> Exclusion | None:
    """Why a case does not apply; None: it does."""
    return next((entry for entry in EXCLUSIONS if entry.matches(case)), None)


def every_case(configurations: list[Configuration]) -> list[Case]:
    """Optimizer x point x law, those that do not apply too."""
    return [
        Case(configuration, point, law)
        for configuration in configurations
        for point in POINTS
        for law in ALL_LAWS
    ]
