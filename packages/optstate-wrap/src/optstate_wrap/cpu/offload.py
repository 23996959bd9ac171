"""``CPUOffloadOptimizer``: optimizer state and step on the host, for parameters on a device."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from optstate_codecs import CodedOptimizer, checks
from optstate_wrap.cpu.host_copy import HostCopies
from optstate_wrap.cpu.host_step import can_step_in_batches, step_in_batches
from optstate_wrap.delegate import Delegate, load_into, unhooked_step
from optstate_wrap.hooks import load_with_hooks, save_with_hooks
from optstate_wrap.probe import probe
from optstate_wrap.state.inference import ordinary_tensors
from optstate_wrap.step.checks import ParamGrad, check_params, check_state
from optstate_wrap.step.swapped_params import swapped_params

__all__ = ["CPUOffloadOptimizer"]

FUSED_ON_HOST = (torch.optim.Adam, torch.optim.AdamW)


class CPUOffloadOptimizer(Delegate):
    """Steps large parameters on the host, where their state stays.

    ``param_groups`` are the user's, with the user's parameters. They are read at every step, like
    parameters and gradients, so clipping, schedules and weights loaded later all take effect. While
    some parameters are stepped, others and their gradients are copied; the host waits for those
    that it steps, and the device for the stepped parameters. If a probe finds that stepping a few
    parameters at a time changes the result, all are stepped at once on the host, after all copies.

    With ``offload_gradients`` each gradient is copied to the host during the backward pass and
    freed on the device. Several passes are summed, with the same bits as on the device. ``step``
    uses the gradients up, and ``zero_grad`` resets them. ``param.grad`` of large parameters is then
    None: clip with this optimizer's ``clip_grad_norm_``, and use bfloat16, not ``GradScaler``.

    Args:
        params: tensors, ``named_parameters()``, or dicts of param groups.
        optimizer_class: the class of the inner optimizer, whose step must not need a closure. For
            torch's Adam and AdamW the fused step is the default, except for complex parameters,
            which it does not take.
        offload_gradients: free gradients on the device during the backward pass.
        minimal_size: parameters with fewer elements are stepped on their device.
        **kwargs: arguments of ``optimizer_class``.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.

    Examples:
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
        self.offload_gradients = checks.flag("offload_gradients", offload_gradients)
        self.minimal_size = checks.whole_number("minimal_size", minimal_size)
        self.inner = optimizer_class(params, **kwargs)
        closure = inspect.signature(unhooked_step(self.inner)).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            name = type(self.inner).__name__
            raise TypeError(f"optimizer_class={name}: its step must not need a closure")
        self._prefer_fused()
        self.attach_inner()

    def attach_inner(self) -> None:
        self._copies = HostCopies()
        self._hooks: dict[Tensor, Any] = {}
        super().attach_inner()
        self._examine()

    def _examine(self) -> None:
        """Find out whether all must be stepped at once, and add gradient hooks."""
        self._whole = not can_step_in_batches(self.inner)
        self._add_hooks()

    def _prefer_fused(self) -> None:
        """Use the fused step of torch's Adam and AdamW in groups that choose no other."""
        if type(self.inner) not in FUSED_ON_HOST:
            return
        for group in self.inner.param_groups:
            is_open = group["fused"] is None is group["foreach"] and not group["differentiable"]
            # torch's fused steps take no complex numbers
            if is_open and all(param.is_floating_point() for param in group["params"]):
                group["fused"] = True

    @property
    def state(self) -> Any:
        """The state by the user's parameters; that of large parameters is on the host."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self.inner.state = value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler then gives the scale to step, which raises
        return self.offload_gradients

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.inner.add_param_group(param_group)
        self._prefer_fused()
        self._examine()

    def _remote(self, param: Tensor) -> bool:
        """Whether a parameter is not on the host."""
        return param.device.type != "cpu"

    def _is_large(self, param: Tensor) -> bool:
        # if all are stepped at once, they must be on one device
        return self._remote(param) and (self._whole or param.numel() >= self.minimal_size)

    def _large(self) -> list[Tensor]:
        """The parameters that are stepped on the host."""
        params = (p for group in self.inner.param_groups for p in group["params"])
        return list(dict.fromkeys(p for p in params if self._is_large(p)))

    def _add_hooks(self) -> None:
        """Take gradients of large parameters as soon as the backward pass has accumulated them."""
        if not self.offload_gradients:
            return
        # weak, since parameters outlive the optimizer
        this = weakref.ref(self)

        def take(param: Tensor) -> None:
            optimizer = this()
            if optimizer and optimizer.offload_gradients and optimizer._is_large(param):
                optimizer._take(param)

        for param in self._large():
            if param.requires_grad and param not in self._hooks:
                self._hooks[param] = param.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        """Copy a gradient to the host, and free it on the device if gradients are offloaded."""
        if param.grad is not None:
            self._copies.of(param).take(param.grad)
            if self.offload_gradients:
                param.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the present gradients.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: ``GradScaler`` steps it, but scaled gradients have been offloaded; or a
                parameter, its gradient or its state cannot be stepped. Nothing has changed.
        """
        if vars(self).pop("found_inf", None) is not None:
            raise RuntimeError(
                "offload_gradients=True: GradScaler finds no gradients on the device to unscale; "
                "use offload_gradients=False, or bfloat16 without a scaler"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._add_hooks()
        large = self._large()
        self._check(large)
        self._copies.begin(large)
        try:
            copied = {}
            # in the order in which they are stepped, so that the first are copied first
            for param in large:
                self._take(param)
                if self._whole or self._copies.gradient(param) is not None:
                    copied[param] = self._copies.of(param)
                    copied[param].fetch()
            step_in_batches(self.inner, copied)
        finally:
            self._copies.end()
        return loss

    def _check(self, large: Iterable[Tensor]) -> None:
        """Raise if a parameter cannot be stepped with its gradient and its state."""
        params = enumerate(p for group in self.inner.param_groups for p in group["params"])
        given = [(n, p, p.grad) for n, p in params]
        check_params(given)
        taken: list[ParamGrad] = []
        if self._copies.made:
            taken = [(number, p, self._copies.gradient(p)) for number, p, _ in given]
            check_params(taken, offloaded=True)
        if isinstance(self.inner, CodedOptimizer):
            return
        findings, on_host = probe(self.inner), set(map(id, large))
        for number, param, grad in [*given, *taken]:
            if grad is not None and (state := self.inner.state.get(param)):
                device = None if id(param) in on_host else param.device
                of = number, param, grad
                check_state(self.inner, findings, of, state, param.shape, device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, also those on the host."""
        super().zero_grad(set_to_none)
        for copy in self._copies.made.values():
            if set_to_none:
                copy.drop()
            else:
                copy.zero()

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` of all gradients, on the device and on the host.

        Returns:
            The norm of all gradients before clipping.
        """
        if self.offload_gradients:
            for param in self._large():
                self._take(param)
        holders: list[Tensor] = []
        params = (p for group in self.inner.param_groups for p in group["params"])
        for param in dict.fromkeys(params):
            if self._copies.gradient(param) is not None:
                self._copies.of(param).wait()
                param = self._copies.of(param).host
            holders.append(param)
        return clip_grad_norm_(holders, max_norm, norm_type, error_if_nonfinite)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict: ``torch.optim`` loads it."""
        return save_with_hooks(self, self.inner, self.inner.state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the inner optimizer's class; state of large parameters to the host.

        Groups stay the same objects and keep ``foreach``, ``fused`` and ``capturable``. Nothing of
        ``state_dict`` is aliased. State loaded under ``torch.inference_mode()`` may be stepped
        outside of it.
        """
        load_with_hooks(self, self.inner, state_dict, self._load)

    def _load(self, state_dict: dict[str, Any]) -> None:
        with ordinary_tensors():
            # empty tensors on the host, of which no memory is touched
            empty = {p: Parameter(torch.empty_like(p, device="cpu"), False) for p in self._large()}
            with swapped_params(self.inner, empty):
                load_into(self.inner, state_dict)
            self._move_foreign(empty)
            self._examine()

    def _move_foreign(self, params: Iterable[Tensor]) -> None:
        """Move entries that are not the optimizer's to the parameters' devices, as torch does."""
        known = None if isinstance(self.inner, CodedOptimizer) else probe(self.inner).known
        if known is None:
            return
        for param in params:
            state = self.inner.state.get(param, {})
            for key, value in state.items():
                if key not in known and isinstance(value, Tensor) and value.dim():
                    state[key] = value.to(param.device)

    def __getstate__(self) -> dict[str, Any]:
        names = ("inner", "offload_gradients", "minimal_size")
        return {name: getattr(self, name) for name in names}

    def set_torch_state(self, values: dict[str, Any]) -> None:
        super().set_torch_state(values)
        self._examine()
