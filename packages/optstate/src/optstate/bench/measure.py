"""Measures the step of one optimizer."""

import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from optstate.bench.contestants import Make
from optstate.bench.timing import milliseconds, synchronize, temporary_bytes
from optstate_codecs.memory import state_bytes

LONGEST_ERROR = 300
WARM = 3
"""Steps that are not timed."""


def measure(
    make: Make,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Times, bytes and temporary memory of a step, all parameters having gradients.

    Args:
        make: called with parameters and ``lr``.
        shapes: of the parameters.
        dtype: of parameters and gradients.
        device: that they are on.
        repeats: steps that are timed, of which the median is taken.
        seconds: for all steps but the first; fewer are taken if they would be longer, at least 2.

    Returns:
        ``repeats``, the steps that were timed;
        ``device_ms``, ``host_ms`` and ``whole_ms`` as of `milliseconds`; ``first_step_s``, in which
        kernels are built; ``moved_bytes``, those that a step must move: parameter, gradient and
        state read, parameter and state written; and counts.
    """
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "generator": generator, "dtype": torch.float32}
    params = []
    for shape in shapes:
        params.append(torch.nn.Parameter(torch.randn(shape, **options).to(dtype)))
        params[-1].grad = torch.randn(shape, **options).to(dtype)
    optimizer = make(params, lr=1e-3)
    begin = perf_counter()
    optimizer.step()
    synchronize(device)
    first = perf_counter() - begin
    begin = perf_counter()
    temporary = temporary_bytes(device, optimizer.step)
    synchronize(device)
    steps = seconds / (perf_counter() - begin)
    if steps > WARM:
        milliseconds(device, optimizer.step, WARM)
    repeats = max(1, min(repeats, int(min(steps - WARM, repeats))))
    times = milliseconds(device, optimizer.step, repeats)
    numel = sum(p.numel() for p in params)
    state = state_bytes(optimizer)
    moved = sum(3 * p.nbytes for p in params) + 2 * state
    return {
        "repeats": repeats,
        "device_ms": times[0],
        "host_ms": times[1],
        "whole_ms": times[2],
        "first_step_s": first,
        "bytes_per_parameter": moved / numel,
        "state_bits_per_parameter": 8 * state / numel,
        "moved_bytes": moved,
        "temporary_bytes": temporary,
        "parameters": numel,
        "tensors": len(params),
    }


def measured(
    make: Make,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    bandwidth: float,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """What `measure` returns, with ``copy_share``; or ``error``, where an optimizer fails.

    Args:
        make: as the others, of `measure`.
        shapes: of the parameters.
        dtype: of parameters and gradients.
        device: that they are on.
        repeats: steps that are timed.
        bandwidth: of copies, in bytes read and written a second.
        seconds: of `measure`.
    """
    try:
        row = measure(make, shapes, dtype, device, repeats, seconds)
    except Exception as error:  # a peer's failure is a result, not the end of the run
        return {"error": repr(error)[:LONGEST_ERROR]}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {**row, "copy_share": row["moved_bytes"] / row["device_ms"] * 1e3 / bandwidth}
