"""Lists of tensors rounded stochastically to bfloat16, or added and rounded, in one launch.

The same bits on every device: element e of tensor n draws from (seed, count, n, e), elements
counted in the target's storage order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.rounding import Draw, stochastic_round_bf16
from optstate_codecs.state.layout import FlatView, is_dense, slices, storage_order
from optstate_codecs.triton_lib import kernels_run

__all__ = ["SOURCES", "round_"]

SOURCES = (torch.float32, torch.bfloat16, torch.float16)
# of a parameter's streams those that optimizers leave free: with the same seed, what a gradient
# and what its parameter draw are independent
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
    """Store each source, or with ``add`` the sum of target and source, rounded, in its target.

    Arithmetic is in float32, and no temporary is larger than a slice. On CUDA devices where triton
    is installed, all pairs of one device and source dtype are one launch on its current stream.

    Args:
        targets: bfloat16; none twice.
        sources: of ``SOURCES``, each of its target's shape and device.
        seed: 0 to 2^63 - 1.
        numbers: what tells the tensors apart, 0 to 2^63 - 1; with the counts they key the draws.
        counts: 0 to 2^31 - 1; a tensor's draws of different counts are independent.
        add: whether targets are added to.
    """
    launches: dict[Any, list[int]] = {}
    for place, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if _kernel_takes(target, source):
            launches.setdefault((target.device, source.dtype), []).append(place)
        else:
            draw = Draw(seed, counts[place], numbers[place], STREAM)
            _round_in_slices(target, source, draw, add)
    for places in launches.values():
        # imported with the first launch, so that CPU users never load triton
        from optstate_codecs.engine.triton.rounding import launch

        chosen = [targets[place] for place in places]
        launch(
            chosen,
            [sources[place] for place in places],
            seed,
            [numbers[place] for place in places],
            [counts[place] for place in places],
            STREAM,
            add,
        )
        for target in chosen:
            # autograd has to see what torch has not written
            torch.autograd.graph.increment_version(target)


def _kernel_takes(target: Tensor, source: Tensor) -> bool:
    """Whether both are plain, dense, laid out alike, and where the kernel runs."""
    plain = (Tensor, torch.nn.Parameter)
    return (
        kernels_run(target.device)
        and type(target) in plain
        and type(source) in plain
        and target.stride() == source.stride()
        and is_dense(target)
    )


def _round_in_slices(target: Tensor, source: Tensor, draw: Draw, add: bool) -> None:
    order = storage_order(target)
    into, given = FlatView(target, order), FlatView(source, order)
    for start, stop in slices(target):
        value = given.read(start, stop).to(torch.float32)
        if add:
            value = into.read(start, stop).to(torch.float32).add_(value)
        bits = draw.at(start).bits16(stop - start, target.device)
        into.write(start, stop, stochastic_round_bf16(value, bits))
