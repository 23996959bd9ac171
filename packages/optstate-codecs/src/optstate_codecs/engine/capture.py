"""What a step may do while a CUDA graph records it.

The host runs once, while the graph is recorded, and the graph then repeats only what the device was
given. So whatever the host makes once (state, plans) must be there before, and what it hands over
must lie where a replay finds it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["capturing", "constant_table", "needs_warm_up"]


def capturing() -> bool:
    """Whether a CUDA graph is recording the current stream."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def needs_warm_up(what: str) -> RuntimeError:
    """The error for ``what`` a step would have to make while it is recorded."""
    return RuntimeError(
        f"CUDA graph capture: {what}; before capturing, take a few steps like the captured one "
        "on a side stream, as torch.cuda.CUDAGraph's documentation says"
    )


def constant_table(
    values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """``values`` as an integer table on ``device``, which fills it, in a graph at each replay.

    They travel as arguments of kernels, about a hundred a launch, which a graph keeps: no host
    memory has to outlive the capture, and nothing waits for other copies from the host.
    """
    table = torch.zeros(len(values), dtype=dtype, device=device)
    torch._foreach_add_(list(table.unbind()), list(values))
    return table
