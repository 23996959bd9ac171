"""Support for CUDA graph capture: detection, the warm-up error, and tables that a graph keeps.

The host code of a step runs once, during capture, and a replay repeats only the device's work. So
state and launch plans must exist before, and tables must stay valid for every replay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["capturing", "constant_table", "needs_warm_up"]


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def needs_warm_up(what: str) -> RuntimeError:
    """The error for a step that has to do host work during capture; ``what`` is the reason."""
    return RuntimeError(
        f"CUDA graph capture: {what}; before capturing, take a few steps like the captured one "
        "on a side stream, as torch.cuda.CUDAGraph's documentation says"
    )


def constant_table(
    values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """``values`` as an integer table that kernels fill, in a graph at each replay.

    The values are kernel arguments, about a hundred a launch, which a graph keeps. So no host
    memory has to outlive the capture, and the table waits for no other copies from the host.
    """
    table = torch.zeros(len(values), dtype=dtype, device=device)
    torch._foreach_add_(list(table.unbind()), list(values))
    return table
