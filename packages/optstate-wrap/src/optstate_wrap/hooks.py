"""State dict hooks of an optimizer around another one: called once, with the optimizer outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

__all__ = ["STATE_DICT_HOOKS", "load_with_hooks", "save_with_hooks"]

STATE_DICT_HOOKS = tuple(
    f"_optimizer_{name}_hooks"
    for name in (
        "state_dict_pre",
        "state_dict_post",
        "load_state_dict_pre",
        "load_state_dict_post",
    )
)
StateDict = dict[str, Any]


def save_with_hooks(outer: Optimizer, inner: Optimizer, save: Callable[[], StateDict]) -> StateDict:
    """What ``save`` gives, or a hook in its place; the hooks are both optimizers'."""
    for pre_hook in outer._optimizer_state_dict_pre_hooks.values():
        pre_hook(outer)
    with _without_hooks(inner):
        saved = save()
    for post_hook in outer._optimizer_state_dict_post_hooks.values():
        saved = _instead(saved, post_hook(outer, saved))
    return saved


def load_with_hooks(
    outer: Optimizer,
    inner: Optimizer,
    state_dict: Mapping[str, Any],
    load: Callable[[StateDict], None],
) -> None:
    """Have ``load`` put a state dict in place, or what a hook gives in its place."""
    given = dict(state_dict)
    for pre_hook in outer._optimizer_load_state_dict_pre_hooks.values():
        given = _instead(given, pre_hook(outer, given))
    with _without_hooks(inner):
        load(given)
    for post_hook in outer._optimizer_load_state_dict_post_hooks.values():
        post_hook(outer)


def _instead(given: StateDict, returned: StateDict | None) -> StateDict:
    """What a hook has returned, or what it was given where it returned nothing."""
    return given if returned is None else returned


@contextmanager
def _without_hooks(inner: Optimizer) -> Iterator[None]:
    """Inside, ``inner`` has no state dict hooks of its own to call."""
    hooks = {name: getattr(inner, name) for name in STATE_DICT_HOOKS}
    vars(inner).update({name: type(held)() for name, held in hooks.items()})
    try:
        yield
    finally:
        vars(inner).update(hooks)
