"""What every optimizer around another one has of it: groups, defaults and hooks, the very same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["Delegate", "own_step"]

# both have the very same dicts, so that a hook fires once, whichever it was given to
HOOKS = tuple(
    f"_optimizer_{name}_hooks"
    for name in (
        "step_pre",
        "step_post",
        "state_dict_pre",
        "state_dict_post",
        "load_state_dict_pre",
        "load_state_dict_post",
    )
)


class Delegate(Optimizer):
    """An optimizer whose groups, defaults and hooks are those of the one inside.

    Attributes:
        inner: the one inside.
    """

    inner: Optimizer

    def _share(self) -> None:
        """Take the inner optimizer's hooks for one's own."""
        self._warned_capturable_if_run_uncaptured = True
        for name in HOOKS:
            setattr(self, name, getattr(self.inner, name))
        self._patch_step_function()

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


def own_step(inner: Optimizer) -> Callable[..., Any]:
    """The optimizer's ``step`` without the hooks that torch puts around it."""
    step = type(inner).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
