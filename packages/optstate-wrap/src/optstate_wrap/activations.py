"""Gradient checkpointing: the backward pass recomputes activations instead of storing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from optstate_codecs import checks

__all__ = ["checkpoint_sequential_modules", "enable_gradient_checkpointing"]


def enable_gradient_checkpointing(model: nn.Module, use_reentrant: bool = False) -> bool:
    """Turn on gradient checkpointing in a model with a method for it, as in ``transformers``.

    Args:
        model: any module.
        use_reentrant: selects one of torch's two implementations; torch recommends False.

    Returns:
        Whether the model has the method.
    """
    use_reentrant = checks.flag("use_reentrant", use_reentrant)
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        return False
    try:
        enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    except TypeError:
        # the method of older models takes no arguments
        enable()
    return True


def checkpoint_sequential_modules(
    modules: Sequence[nn.Module] | nn.Sequential,
    segments: int,
    x: Tensor,
    use_reentrant: bool = False,
) -> Tensor:
    """Run modules one after the other, storing only the inputs of each segment.

    Args:
        modules: modules in the order of their calls.
        segments: number of segments, from 1 to the number of modules.
        x: input of the first module.
        use_reentrant: selects one of torch's two implementations.

    Returns:
        The output of the last module.
    """
    segments = checks.whole_number("segments", segments)
    if not 1 <= segments <= len(modules):
        raise ValueError(f"segments={segments}: must be from 1 to {len(modules)}")
    steps = list(modules)
    result: Tensor = checkpoint_sequential(steps, segments, x, use_reentrant=use_reentrant)  # type: ignore[no-untyped-call]
    return result
