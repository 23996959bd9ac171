"""Optimizer state in the host's memory, with the step on the device.

Transfers here are synchronous; what moves is one slab for each chunk and way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from optstate_wrap.policies import AnyCodec, ConfigurablePolicy, Policy
from optstate_wrap.wrapper import OptimizerWrapper

__all__ = ["OffloadOptimizer"]


class OffloadOptimizer(OptimizerWrapper):
    """Keeps any optimizer's state in the host's memory; the step runs where the parameters are.

    Args:
        optimizer: the inner optimizer; what state it has is taken over.
        state: how state is stored: a ``Policy``; a map of codecs by state key; or None, exact.
        store: "host", or "device" to keep the coded state beside the parameters.
        **options: ``chunk_size`` and the others of ``OptimizerWrapper``.

    Example:
        >>> optimizer = OffloadOptimizer(torch.optim.AdamW(model.parameters()))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        state: Policy | Mapping[str, AnyCodec] | None = None,
        store: str = "host",
        **options: Any,
    ) -> None:
        if state is not None and not isinstance(state, (Policy, Mapping)):
            raise TypeError(
                f"state={state!r}: must be a Policy, a map of codecs by state key, or None, "
                f"got {type(state).__name__}"
            )
        policy = state if isinstance(state, Policy) else ConfigurablePolicy(state or {})
        super().__init__(optimizer, policy, store=store, **options)
