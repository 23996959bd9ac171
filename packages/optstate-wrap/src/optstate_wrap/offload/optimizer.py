"""``OffloadOptimizer``: any optimizer's state in host memory, with the step on the device."""

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
    """Keeps any optimizer's state in host memory; the step runs on the parameters' device.

    On a GPU, loads, steps and stores of different chunks run at the same time, and the host does
    not wait for them. If the inner optimizer is torch's Adam, AdamW or SGD and the engine takes it
    (see ``fused`` of ``OptimizerWrapper``), its state is never decoded to memory.

    Args:
        optimizer: the inner optimizer; its state is taken over.
        state: how state is stored: a ``Policy``; a map of codecs by state key; or None, exact.
        store: "host", or "device" to keep the coded state on the parameters' device.
        resident_bytes: bytes that stay on the device of the state that the codecs' engine steps.
        **options: ``chunk_size`` and the other options of ``OptimizerWrapper``.

    Examples:
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
