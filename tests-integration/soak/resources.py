"""What a process holds: memory, handles, threads."""

from __future__ import annotations

import gc
import mmap
import os
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

__all__ = ["BOUNDS", "Held", "growth", "held", "traced_growth"]

MIB = 1 << 20


@dataclass(frozen=True)
class Held:
    """What a process holds now.

    Attributes:
        resident: bytes of the process in memory, after those that malloc kept were given back.
        blocks: Python's memory blocks.
        tensors: objects of torch.Tensor that are alive.
        handles: open file descriptors.
        threads: of the system, those of native code too.
        regions: bytes of memory maps that Python objects own, page-locked ones among them.
        device: bytes of tensors on the GPU.
    """

    resident: int
    blocks: int
    tensors: int
    handles: int
    threads: int
    regions: int
    device: int


#: by how much a run may grow, whatever its length. Blocks and resident bytes are not exact: caches
#: of Python and of malloc fill up. A leak of one object a step would exceed each in 1,000 steps.
BOUNDS = Held(resident=4 * MIB, blocks=500, tensors=0, handles=0, threads=0, regions=0, device=0)


def held() -> Held:
    """What this process holds, after garbage collection."""
    for _ in range(2):
        gc.collect()
    objects = gc.get_objects()
    return Held(
        resident=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        blocks=sys.getallocatedblocks(),
        tensors=sum(issubclass(type(one), torch.Tensor) for one in objects),
        handles=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        regions=sum(len(one) for one in objects if issubclass(type(one), mmap.mmap)),
        device=torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
    )


def growth(before: Held, after: Held) -> dict[str, int]:
    """What has grown beyond the bounds, and by how much."""
    old, new, most = asdict(before), asdict(after), asdict(BOUNDS)
    return {key: new[key] - old[key] for key in old if new[key] - old[key] > most[key]}


def traced_growth(work: Callable[[], object]) -> int:
    """Bytes that Python code has allocated during the work and still holds."""
    tracemalloc.start(1)
    try:
        work()
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        work()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - first
    finally:
        tracemalloc.stop()
