"""Optimizer state in the host's memory, with the step on the device or on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate_codecs import CodedOptimizer, checks
from optstate_wrap.delegate import Delegate, own_step
from optstate_wrap.policies import AnyCodec, ConfigurablePolicy, Policy
from optstate_wrap.store import HostStore, Store
from optstate_wrap.wrapper import OptimizerWrapper

__all__ = ["CPUOffloadOptimizer", "OffloadOptimizer"]


class OffloadOptimizer(OptimizerWrapper):
    """Keeps any optimizer's state in the host's memory; the step runs where the parameters are.

    Where the inner optimizer is torch's Adam, AdamW or SGD and the engine takes it (see ``fused``
    of ``OptimizerWrapper``), state streams: loads, steps and stores of different chunks are under
    way at once. Others' state comes and goes chunk by chunk while the step waits.

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
        checks.whole_number("resident_bytes", resident_bytes)
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


class CPUOffloadOptimizer(Delegate):
    """Steps large parameters on the host, whose state and copies of parameters never leave it.

    ``param_groups`` are the user's, with the user's parameters; the inner optimizer has the very
    same groups' values and, for parameters that are elsewhere and not small, copies on the host.

    Args:
        params: tensors, ``named_parameters()``, or dicts of param groups.
        optimizer_class: of the inner optimizer, ``torch.optim.AdamW`` if left out.
        offload_gradients: free each gradient on the device once it is copied in ``step``.
        minimal_size: parameters with fewer elements are stepped where they are.
        **kwargs: of ``optimizer_class``.

    Example:
        >>> optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, lr=3e-4)
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: Callable[..., Optimizer] = torch.optim.AdamW,
        *,
        offload_gradients: bool = False,
        minimal_size: int = 4096,
        **kwargs: Any,
    ) -> None:
        checks.flag("offload_gradients", offload_gradients)
        checks.whole_number("minimal_size", minimal_size)
        self.offload_gradients = offload_gradients
        self.minimal_size = minimal_size
        self.inner = optimizer_class(params, **kwargs)
        self._copies: dict[Tensor, Parameter] = {}
        self._share()

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state by the user's parameters; of offloaded ones, on the host."""
        return self.inner.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.inner.add_param_group(param_group)

    def _offloaded(self, param: Tensor) -> bool:
        return param.device.type != "cpu" and param.numel() >= self.minimal_size

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients as they are now, clipped or not.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, state = self.inner.param_groups, self.inner.state
        lists = [group["params"] for group in groups]
        host: dict[Any, Any] = {
            p: self._on_host(p) for params in lists for p in params if self._offloaded(p)
        }
        user: dict[Any, Any] = {copy: param for param, copy in host.items()}
        # the state follows the parameter that is stepped, and then returns to the user's
        self.inner.state = type(state)(dict, {host.get(k, k): v for k, v in state.items()})
        try:
            for group, params in zip(groups, lists, strict=True):
                group["params"] = [host.get(p, p) for p in params]
            own_step(self.inner)(self.inner)
            for param, copy in host.items():
                if copy.grad is not None:
                    param.copy_(copy)
        finally:
            for group, params in zip(groups, lists, strict=True):
                group["params"] = params
            for copy in user:
                copy.grad = None
            stepped = self.inner.state
            self.inner.state = type(stepped)(dict, {user.get(k, k): v for k, v in stepped.items()})
        return loss

    def _on_host(self, param: Tensor) -> Parameter:
        """A copy of a parameter on the host, with what its gradient and value are now."""
        if param not in self._copies:
            pinned = torch.empty_like(param, device="cpu", pin_memory=param.device.type == "cuda")
            self._copies[param] = Parameter(pinned, requires_grad=param.requires_grad)
        copy = self._copies[param]
        # the parameter decides, so that weights loaded since stay
        copy.data.copy_(param)
        copy.grad = None if param.grad is None else param.grad.to("cpu")
        if self.offload_gradients:
            param.grad = None
        return copy

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict: ``torch.optim`` loads it."""
        return self.inner.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the inner optimizer's class; groups stay the same objects."""
        groups = self.inner.param_groups
        self.inner.load_state_dict(state_dict)
        for group, new in zip(groups, self.inner.param_groups, strict=True):
            params = group["params"]
            group.clear()
            group.update(new)
            group["params"] = params
        self.inner.param_groups = groups
        for param, state in self.inner.state.items():
            if isinstance(param, Tensor) and self._offloaded(param):
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        state[key] = value.to("cpu")

    def __getstate__(self) -> dict[str, Any]:
        names = ("inner", "offload_gradients", "minimal_size")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._copies = {}
        self._share()
