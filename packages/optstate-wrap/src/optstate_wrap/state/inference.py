"""A context for making state under ``torch.inference_mode()`` that can be stepped outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["ordinary_tensors"]


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Inside, new tensors have no autograd graph and can be changed in place anywhere later."""
    with torch.inference_mode(False), torch.no_grad():
        yield
