"""Shared by the parts of the offload benchmark: contestants, bus bandwidth, counts of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from lowbit_adam import AdamW4bit, AdamW8bit
from optstate.bench.timing import synchronize
from optstate.process import resident_bytes
from optstate_codecs import Adam, CodedOptimizer, offload, state_bytes
from optstate_codecs.offloading.pinned import empty_pinned
from optstate_wrap import OffloadOptimizer, OptimizerWrapper

Make = Callable[..., CodedOptimizer]


def _adamw(format_: str) -> Make:
    """AdamW with both moments in this format."""
    formats = dict.fromkeys(("exp_avg", "exp_avg_sq"), format_)
    return partial(CodedOptimizer, rule=Adam(decoupled=True), formats=formats)


FORMATS: dict[str, Make] = {
    "exact": _adamw("fp32"),
    "bf16": _adamw("bf16"),
    "int8": AdamW8bit,
    "4-bit": AdamW4bit,
}


@dataclass(frozen=True)
class Sizes:
    """The device and the sizes of a run.

    Attributes:
        device: that steps.
        chunk_bytes: of state that moves at a time.
        small: everything tiny, to try the benchmark itself.
    """

    device: torch.device
    chunk_bytes: int
    small: bool


@dataclass(frozen=True)
class Contestant:
    """An optimizer under a name.

    Attributes:
        make: it, from parameters.
        store: where its state is: "host", "device", or "cpu", where the step is too.
        dtypes: of parameters that it is measured with.
        family: whether it is one of ours, which can step beside the backward.
    """

    name: str
    make: Callable[[Sequence[Parameter], Sizes], Optimizer]
    store: str
    dtypes: tuple[str, ...] = ("bfloat16",)
    family: bool = False


def streamed(make: Make, params: Sequence[Parameter], sizes: Sizes) -> Optimizer:
    """An optimizer of the family with its state in host memory."""
    return offload(make(params, lr=1e-3), chunk_bytes=sizes.chunk_bytes)


def torchaos(gradients: bool, params: Sequence[Parameter], sizes: Sizes) -> Optimizer:
    """torchao's optimizer that steps on the CPU."""
    from torchao.optim import CPUOffloadOptimizer

    made: Optimizer = CPUOffloadOptimizer(
        params, AdamW, offload_gradients=gradients, lr=1e-3, weight_decay=0.01
    )
    return made


def wrapped(
    state: dict[str, str] | None, options: dict[str, bool], params: Sequence[Parameter], _: Sizes
) -> Optimizer:
    """torch's AdamW in an ``OffloadOptimizer`` with its default chunk size."""
    inner = AdamW(params, lr=1e-3, fused=state is None)
    return OffloadOptimizer(inner, state, **options)


WRAPPED = {"exp_avg": "int8(block_size=256)", "exp_avg_sq": "oneq(bits=8,block_size=256)"}


def contestants() -> dict[str, Contestant]:
    """All contestants, by name."""
    both = ("float32", "bfloat16")
    made = [
        Contestant(f"{name} offloaded", partial(streamed, make), "host", dtypes, True)
        for (name, make), dtypes in zip(FORMATS.items(), (both, *[("bfloat16",)] * 3), strict=True)
    ]
    made += [
        Contestant("torch fused, OffloadOptimizer exact", partial(wrapped, None, {}), "host", both),
        Contestant(
            "AdamW int8, OffloadOptimizer",
            partial(wrapped, WRAPPED, {"fused": True}),
            "host",
            both,
        ),
        Contestant("torch fused", lambda p, _: AdamW(p, lr=1e-3, fused=True), "device", both),
        Contestant("AdamW8bit", lambda p, _: AdamW8bit(p, lr=1e-3), "device", family=True),
        Contestant("torchao CPUOffload", partial(torchaos, False), "cpu", both),
        Contestant("torchao CPUOffload, gradients too", partial(torchaos, True), "cpu"),
    ]
    return {one.name: one for one in made}


def unhook(params: Iterable[Parameter]) -> None:
    """Remove the hooks that optimizers put on parameters, which keep both from being freed."""
    for param in params:
        (param._post_accumulate_grad_hooks or {}).clear()
        param.grad = None


@contextmanager
def clean(device: torch.device) -> Iterator[None]:
    """Free all memory on the device."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # torch also keeps freed pinned memory
            getattr(torch._C, "_host_emptyCache", lambda: None)()


def bus(sizes: Sizes) -> dict[str, float]:
    """Bytes a second between pinned host memory and the device, in copies of 32 MiB.

    "both" is each way while both run, the most that a transfer of state can reach.
    """
    device, cuda = sizes.device, sizes.device.type == "cuda"
    nbytes, rooms, rounds = (1 << 16, 2, 2) if sizes.small else (1 << 25, 8, 64)
    # several of each, so that the processor's cache does not hold them
    sources = [empty_pinned(nbytes, cuda).fill_(1) for _ in range(rooms)]
    sinks = [empty_pinned(nbytes, cuda).fill_(1) for _ in range(rooms)]
    there = [torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)] if cuda else [None, None]

    def copy(to_device: bool, to_host: bool) -> float:
        def once(count: int) -> None:
            for n in range(count):
                if to_device:
                    with torch.cuda.stream(streams[0]):
                        there[0].copy_(sources[n % rooms], non_blocking=True)
                if to_host:
                    with torch.cuda.stream(streams[1]):
                        sinks[n % rooms].copy_(there[1], non_blocking=True)

        once(2 * rooms)
        synchronize(device)
        begin = perf_counter()
        once(rounds)
        synchronize(device)
        return rounds * nbytes / (perf_counter() - begin)

    return {
        "to_device": copy(True, False),
        "to_host": copy(False, True),
        "both": copy(True, True),
    }


def allocated(device: torch.device, peak: bool = False) -> int:
    """Bytes of tensors on a GPU now, or at most since the last ``forget_peak``."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())


def reserved(device: torch.device) -> int:
    """Bytes that torch's allocator holds."""
    return int(torch.cuda.memory_reserved()) if device.type == "cuda" else 0


def forget_peak(device: torch.device) -> None:
    """Reset the peak of allocated bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def process_bytes(peak: bool = False) -> int:
    """Resident bytes of this process, now or at their peak; 0 where they are not known."""
    return resident_bytes(peak) or 0


def moved_bytes(optimizer: Optimizer) -> int:
    """Bytes of state that a step copies to the device and back; 0 if none."""
    if isinstance(optimizer, OptimizerWrapper):
        on_host = optimizer.engine.store.name == "host"
        return optimizer.memory_report().state_bytes if on_host else 0
    if getattr(optimizer, "offloaded", None) is None:
        return 0
    assert isinstance(optimizer, CodedOptimizer)
    session: Any = optimizer.executor
    return sum(slab.nbytes for slab in session.placement.slabs)


def host_bytes(optimizer: Optimizer) -> int:
    """Bytes on the host: of state, and for a step on the CPU of parameters and gradients too."""
    mirrors: dict[Tensor, Tensor] = getattr(optimizer, "param_d2h_map", {})
    if mirrors:
        inner: dict[Tensor, Optimizer] = optimizer.optim_dict  # type: ignore[attr-defined]
        copies = sum(2 * host.nbytes for host in mirrors.values())
        return copies + sum(map(state_bytes, inner.values()))
    if isinstance(optimizer, OptimizerWrapper):
        spares = getattr(optimizer.engine.store, "spares", None)
        return moved_bytes(optimizer) + (spares.nbytes if spares is not None else 0)
    if not moved_bytes(optimizer):
        return 0
    session: Any = optimizer.executor  # type: ignore[attr-defined]
    return sum(memory.tensor.numel() for slab in session.placement.slabs for memory in slab.family)
