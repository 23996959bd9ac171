"""Optimizer state in the host's memory, with the step on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from optstate_codecs import CodedOptimizer, checks
from optstate_wrap.offload.host import HostStore
from optstate_wrap.policies import AnyCodec, ConfigurablePolicy, Policy
from optstate_wrap.state.store import Store
from optstate_wrap.wrapper import OptimizerWrapper

__all__ = ["OffloadOptimizer"]


class OffloadOptimizer(OptimizerWrapper):
    """Keeps any optimizer's state in the host's memory; the step runs where the parameters are.

    State streams: on a GPU, loads, steps and stores of different chunks are under way at once, and
    nothing waits for them. Where the inner optimizer is torch's Adam, AdamW or SGD and the engine
    takes it (see ``fused`` of ``OptimizerWrapper``), what moves is never decoded to memory.

    Args:
        optimizer: the inner optimizer; what state it has is taken over.
        state: how state is stored: a ``Policy``; a map of codecs by state key; or None, exact.
        store: "host", or "device" to keep the coded state beside the parameters.
        resident_bytes: of state that stays on the device, of what the codecs' engine steps.
        **options: ``chunk_size`` and the others of ``OptimizerWrapper``.

    Example:
        >>> optimizer = OffloadOptimizer(torch.optim.AdamW(model.parameters()))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        state: Policy | Mapping[str, AnyCodec] | None = None,
        store: str = "host",
        resident_bytes: int = 0,
        **options: Any,
    ) -> None:
        resident_bytes = checks.whole_number("resident_bytes", resident_bytes)
        if isinstance(optimizer, CodedOptimizer):
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} keeps coded state itself; use "
                "optstate_codecs.offload(optimizer)"
            )
        if state is not None and not isinstance(state, (Policy, Mapping)):
            raise TypeError(
                f"state={state!r}: must be a Policy, a map of codecs by state key, or None, "
                f"got {type(state).__name__}"
            )
        policy = state if isinstance(state, Policy) else ConfigurablePolicy(state or {})
        kept: str | Store = store
        if store == "host":
            kept = HostStore(options.get("pin_memory"), resident_bytes=resident_bytes)
        super().__init__(optimizer, policy, store=kept, **options)
