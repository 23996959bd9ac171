"""Stochastic rounding of many tensors to bfloat16, or adding and rounding, in one launch.

Element e of tensor n draws from (seed, count, n, e), with elements counted in the target's storage
order, so that the bits are the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.cpu import rounding
from optstate_codecs.engine.cpu.rounding import round_with, rounding_choice, rounding_kernel
from optstate_codecs.rounding import Draw, stochastic_round_bf16
from optstate_codecs.state.layout import FlatView, is_dense, slices, storage_order
from optstate_codecs.triton_lib import kernels_run

__all__ = ["SOURCES", "round_"]

SOURCES = (torch.float32, torch.bfloat16, torch.float16)
# a stream that optimizers do not use: with the same seed, the draws of a gradient and of its
# parameter are independent
STREAM = 8


@torch.no_grad()
def round_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    seed: int,
    numbers: Sequence[int],
    counts: Sequence[int],
    *,
    add: bool = False,
) -> None:
    """Round each source, or with ``add`` the sum of target and source, into its target.

    Arithmetic is in float32, and no temporary is larger than a slice. On CUDA devices with triton,
    all pairs of one device and source dtype share one launch on the device's current stream. On a
    CPU they share one call of a compiled kernel once that is built (``engine.cpu.choice``).

    Args:
        targets: bfloat16; none twice.
        sources: of ``SOURCES``, each of its target's shape and device.
        seed: 0 to 2^63 - 1.
        numbers: identify the tensors, 0 to 2^63 - 1; with the counts they key the draws.
        counts: 0 to 2^31 - 1; a tensor's draws of different counts are independent.
        add: whether to add sources to targets.
    """
    launches: dict[Any, list[int]] = {}
    on_host: dict[torch.dtype, list[int]] = {}
    for position, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if _kernel_takes(target, source):
            launches.setdefault((target.device, source.dtype), []).append(position)
        elif target.device.type == "cpu" and _is_plain(target, source):
            on_host.setdefault(source.dtype, []).append(position)
        else:
            draw = Draw(seed, counts[position], numbers[position], STREAM)
            _round_in_slices(target, source, draw, add)
    for positions in on_host.values():
        _round_on_host(
            [targets[p] for p in positions],
            [sources[p] for p in positions],
            [numbers[p] for p in positions],
            [counts[p] for p in positions],
            seed,
            add,
        )
    for positions in launches.values():
        # imported with the first launch, so that CPU users never import the kernel
        from optstate_codecs.engine.triton.rounding import launch

        chosen = [targets[p] for p in positions]
        launch(
            chosen,
            [sources[p] for p in positions],
            seed,
            [numbers[p] for p in positions],
            [counts[p] for p in positions],
            STREAM,
            add,
        )
        for target in chosen:
            # tells autograd of writes that torch has not made
            torch.autograd.graph.increment_version(target)


def _kernel_takes(target: Tensor, source: Tensor) -> bool:
    """Whether the kernel runs there and both are plain and dense with equal strides."""
    return kernels_run(target.device) and _is_plain(target, source)


def _is_plain(target: Tensor, source: Tensor) -> bool:
    plain = (Tensor, torch.nn.Parameter)
    return (
        type(target) in plain
        and type(source) in plain
        and target.stride() == source.stride()
        and is_dense(target)
    )


def _round_on_host(
    targets: list[Tensor],
    sources: list[Tensor],
    numbers: list[int],
    counts: list[int],
    seed: int,
    add: bool,
) -> None:
    """Round sources of one dtype with a compiled kernel, or torch operations until it is built."""
    dtype, elements = sources[0].dtype, sum(target.numel() for target in targets)
    choice = rounding_choice(dtype, add) if dtype in rounding.SOURCES else None
    kernel = None if choice is None else rounding_kernel(choice, elements)
    if kernel is not None:
        keys = [(seed, number, STREAM) for number in numbers]
        round_with(kernel, targets, sources, keys, counts)
        for target in targets:
            # tells autograd of writes that torch has not made
            torch.autograd.graph.increment_version(target)
        return
    begin = perf_counter()
    for target, source, number, count in zip(targets, sources, numbers, counts, strict=True):
        _round_in_slices(target, source, Draw(seed, count, number, STREAM), add)
    if choice is not None:
        choice.spent(perf_counter() - begin, elements)


def _round_in_slices(target: Tensor, source: Tensor, draw: Draw, add: bool) -> None:
    order = storage_order(target)
    into, given = FlatView(target, order), FlatView(source, order)
    for start, stop in slices(target):
        value = given.read(start, stop).to(torch.float32)
        if add:
            value = into.read(start, stop).to(torch.float32).add_(value)
        bits = draw.at(start).bits16(stop - start, target.device)
        into.write(start, stop, stochastic_round_bf16(value, bits))
