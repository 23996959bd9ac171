"""Calls a wrapped optimizer's state dict hooks once, and switches its hooks off for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

__all__ = ["STATE_DICT_HOOKS", "STEP_HOOKS", "load_with_hooks", "save_with_hooks", "without_hooks"]

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")

STATE_DICT_HOOKS = tuple(
    f"_optimizer_{name}_hooks"
    for name in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
)
StateDict = dict[str, Any]


def save_with_hooks(outer: Optimizer, inner: Optimizer, save: Callable[[], StateDict]) -> StateDict:
    """The result of ``save``, or its replacement by a hook; both optimizers share the hooks."""
    for pre_hook in outer._optimizer_state_dict_pre_hooks.values():
        pre_hook(outer)
    with without_hooks(inner, STATE_DICT_HOOKS):
        saved = save()
    for post_hook in outer._optimizer_state_dict_post_hooks.values():
        saved = _replaced(saved, post_hook(outer, saved))
    return saved


def load_with_hooks(
    outer: Optimizer,
    inner: Optimizer,
    state_dict: Mapping[str, Any],
    load: Callable[[StateDict], None],
) -> None:
    """Call ``load`` with a state dict, or with its replacement by a hook."""
    given = dict(state_dict)
    for pre_hook in outer._optimizer_load_state_dict_pre_hooks.values():
        given = _replaced(given, pre_hook(outer, given))
    with without_hooks(inner, STATE_DICT_HOOKS):
        load(given)
    for post_hook in outer._optimizer_load_state_dict_post_hooks.values():
        post_hook(outer)


def _replaced(given: StateDict, returned: StateDict | None) -> StateDict:
    """The state dict that a hook returned, or the given one if it returned None."""
    return given if returned is None else returned


@contextmanager
def without_hooks(inner: Optimizer, names: Iterable[str]) -> Iterator[None]:
    """Inside, ``inner`` has none of the hooks in the attributes ``names``."""
    hooks = {name: getattr(inner, name) for name in names}
    vars(inner).update({name: type(dicts)() for name, dicts in hooks.items()})
    try:
        yield
    finally:
        vars(inner).update(hooks)
