"""A context for making state under ``torch.inference_mode()`` that can be stepped outside of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

__all__ = ["ordinary_tensors"]


def ordinary_tensors() -> AbstractContextManager[Any]:
    """Inside, new tensors have no autograd graph and can be changed in place anywhere later."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack
