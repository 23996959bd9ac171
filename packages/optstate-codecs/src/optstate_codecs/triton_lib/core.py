"""Triton as an optional dependency: ``jit``, constants, and where kernels run.

Without triton, functions under ``jit`` are plain Python that is never called. With
``TRITON_INTERPRET=1`` they run on CPU tensors.
"""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover - exercised by the isolated session
    triton = None
    tl = None

__all__ = ["BACKEND_VARIABLE", "HAS_TRITON", "INTERPRETED", "constant", "jit", "kernels_run", "tl"]

HAS_TRITON = triton is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# the environment variable that replaces backend="auto"
BACKEND_VARIABLE = "OPTSTATE_BACKEND"


def kernels_run(where: torch.device) -> bool:
    """Whether work outside a step, which has no ``backend`` argument, uses kernels on a device."""
    wanted = os.environ.get(BACKEND_VARIABLE, "auto") in ("auto", "triton")
    return HAS_TRITON and wanted and (where.type == "cuda" or INTERPRETED)


def jit(function: Any) -> Any:
    """``triton.jit``, or the function itself without triton."""
    return triton.jit(function) if HAS_TRITON else function


def constant(value: Any) -> Any:
    """A module-level constant that device functions may read."""
    return tl.constexpr(value) if HAS_TRITON and not INTERPRETED else value


# ``INTERPRETED`` as device functions read it
INTERPRET = constant(INTERPRETED)
