"""The base of optimizers around another optimizer, whose groups, defaults and hooks they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_wrap.hooks import STATE_DICT_HOOKS, STEP_HOOKS

__all__ = ["Delegate", "load_into", "unhooked_step"]

#: group options that say how a step is computed on this machine, not its result
FLAGS = ("capturable", "foreach", "fused")
#: attributes with which torch's optimizers are pickled
TORCH = ("state", "param_groups", "defaults")
# The hook dicts are the same objects, so that each hook is called once, wherever it was added.
HOOKS = (*STEP_HOOKS, *STATE_DICT_HOOKS)


class Delegate(Optimizer):
    """An optimizer with the groups, defaults and hooks of an inner one.

    Attributes:
        inner: the inner optimizer.
    """

    inner: Optimizer

    def share_hooks(self) -> None:
        """Use the inner optimizer's hooks as this one's."""
        self._warned_capturable_if_run_uncaptured = True
        for name in HOOKS:
            setattr(self, name, getattr(self.inner, name))
        self._patch_step_function()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, or take new ``state``, groups or defaults, as torch's optimizers do."""
        values = {key: value for key, value in state.items() if key in TORCH}
        vars(self).update({key: value for key, value in state.items() if key not in TORCH})
        if "inner" in state:
            self.attach_inner()
        if values:
            self.set_torch_state(values)

    def attach_inner(self) -> None:
        """Set up the attributes that depend on a new ``inner``."""
        self.share_hooks()

    def set_torch_state(self, values: dict[str, Any]) -> None:
        """Take new ``state``, ``param_groups`` or ``defaults``."""
        self.inner.__setstate__(values)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner.defaults = value


def unhooked_step(inner: Optimizer) -> Callable[..., Any]:
    """The ``step`` function of an optimizer's class, without the hooks that torch adds."""
    step = type(inner).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def load_into(inner: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict without aliasing it; groups stay the same objects and keep ``FLAGS``."""
    groups = inner.param_groups
    states = [state for state in state_dict["state"].values() if isinstance(state, Mapping)]
    given = {id(value) for state in states for value in state.values()}
    saved = state_dict["param_groups"]
    if len(saved) == len(groups):
        flags = [{key: group[key] for key in FLAGS if key in group} for group in groups]
        saved = [{**group, **own} for group, own in zip(saved, flags, strict=True)]
    inner.load_state_dict({**state_dict, "param_groups": saved})
    for group, new in zip(groups, inner.param_groups, strict=True):
        if group is not new:
            group.clear()
            group.update(new)
    inner.param_groups = groups
    for state in inner.state.values():
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor) and id(value) in given:
                state[key] = value.clone()
