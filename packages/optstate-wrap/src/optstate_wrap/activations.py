"""Gradient checkpointing, in torch's own words: activations are computed again instead of kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from optstate_codecs import checks

__all__ = ["checkpoint_sequential_modules", "enable_gradient_checkpointing"]


def enable_gradient_checkpointing(model: nn.Module, use_reentrant: bool = False) -> bool:
    """Turn gradient checkpointing on in a model that has a method for it, as transformers' do.

    Args:
        model: any module.
        use_reentrant: which of torch's two ways; False is the one that torch recommends.

    Returns:
        Whether the model had the method.
    """
    use_reentrant = checks.flag("use_reentrant", use_reentrant)
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        return False
    try:
        enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    except TypeError:
        # older models take no arguments
        enable()
    return True


def checkpoint_sequential_modules(
    modules: Sequence[nn.Module] | nn.Sequential,
    segments: int,
    x: Tensor,
    use_reentrant: bool = False,
) -> Tensor:
    """Run modules one after the other and keep only what goes into each segment.

    Args:
        modules: in order.
        segments: how many, from 1 to the number of modules.
        x: what goes into the first.
        use_reentrant: which of torch's two ways.

    Returns:
        What comes out of the last.
    """
    segments = checks.whole_number("segments", segments)
    if not 1 <= segments <= len(modules):
        raise ValueError(f"segments={segments}: must be from 1 to {len(modules)}")
    steps = list(modules)
    result: Tensor = checkpoint_sequential(steps, segments, x, use_reentrant=use_reentrant)  # type: ignore[no-untyped-call]
    return result
