"""A step over many chunks in which every parameter is either before its step or after it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_wrap.state.param_chunks import ParamChunk
from optstate_wrap.state.record import Record
from optstate_wrap.state.store import Store
from optstate_wrap.step.scratch import Scratch

__all__ = ["Transaction", "group_changes", "guarded_inner", "restore_groups", "set_entries"]

# of a parameter in parts, what it was stays on the device if it is not larger
UNDO_BYTES = 1 << 26
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class Transaction:
    """Keeps what parameters were until the new records of all their parts are stored."""

    def __init__(self, store: Store, scratch: Scratch) -> None:
        self.store = store
        self.scratch = scratch
        self.done: list[int] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._new: dict[Tensor, list[Record]] = {}
        self._numbers: dict[Tensor, int] = {}

    def save(self, tensor: Tensor, away: bool = False) -> None:
        """Note what a tensor is, before it is stepped in place; ``away`` from the device."""
        self._before.append((tensor, self.scratch.copy_of(tensor, away)))

    def save_params(self, batch: Sequence[ParamChunk]) -> None:
        """Note what the parameters of a batch are.

        Where state is on the host, so is what a very large one was: until all of its parts are
        stepped, that would take more of the device than the state that comes and goes.
        """
        for chunk in batch:
            large = chunk.parts > 1 and chunk.param.nbytes > UNDO_BYTES
            self.save(chunk.data(), large and self.store.name == "host")

    def add(self, batch: Sequence[ParamChunk], records: Sequence[Record]) -> None:
        """The chunks of a batch are stepped, and ``records`` are their new states."""
        placed = self.store.to_store([[record] for record in records])
        for chunk, (record,) in zip(batch, placed, strict=True):
            self._new.setdefault(chunk.param, []).append(record)
            self._numbers[chunk.param] = chunk.number

    def commit(self, batch: Sequence[ParamChunk]) -> None:
        """Keep what is complete, after the last chunk of a batch."""
        if not batch or not batch[-1].last:
            return
        # a parameter whose optimizer keeps nothing of it has no record
        new, self._new = self._new, {}
        params = [param for param, records in new.items() if any(records)]
        self.store.swap(params, [new[param] for param in params])
        self.done += self._numbers.values()
        self._before.clear()
        self.scratch.reset()
        self._numbers.clear()

    def roll_back(self) -> None:
        """Undo the steps of what is not complete."""
        for data, before in self._before:
            data.copy_(before)
        for records in self._new.values():
            self.store.discard(records)


@contextmanager
def guarded_inner(inner: Optimizer) -> Iterator[list[dict[str, Any]]]:
    """The inner optimizer with its hooks out of reach; afterwards, with its own groups again.

    Yields:
        what every group held before, as ``restore`` takes it.

    An exception restores the groups' values too.
    """
    groups, state = inner.param_groups, inner.state
    lists = [group["params"] for group in groups]
    before = snapshot(groups)
    hooks = {name: getattr(inner, name) for name in HOOKS}
    for name in HOOKS:
        setattr(inner, name, type(hooks[name])())
    try:
        yield before
    except BaseException:
        restore_groups(groups, before)
        raise
    finally:
        inner.param_groups, inner.state = groups, state
        for group, params in zip(groups, lists, strict=True):
            group["params"] = params
        for name, value in hooks.items():
            setattr(inner, name, value)


def snapshot(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the groups hold but for their parameters; of tensors, also their values."""
    return [
        {key: (value, _kept(value)) for key, value in group.items() if key != "params"}
        for group in groups
    ]


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value._version, value.detach().clone()
    if isinstance(value, (list, dict, set)):
        return copy.deepcopy(value)
    return None


def restore_groups(groups: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> None:
    """Make the groups hold what they held: the same objects with the same values."""
    for group, values in zip(groups, before, strict=True):
        for key in [key for key in group if key != "params" and key not in values]:
            del group[key]
    set_entries(groups, before)


def group_changes(
    groups: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Values that the groups hold now and did not hold ``before``, for ``set_entries``."""
    return [
        {key: entry for key, entry in new.items() if key not in old or _differ(entry, old[key])}
        for new, old in zip(snapshot(groups), before, strict=True)
    ]


def _differ(entry: tuple[Any, Any], old: tuple[Any, Any]) -> bool:
    value, kept = entry
    if value is not old[0]:
        return True
    # a container is the same object and may hold something else
    return kept is not None and (not isinstance(value, Tensor) or bool(kept[0] != old[1][0]))


def set_entries(groups: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> None:
    """Let the groups hold these values, besides what else they hold."""
    for group, values in zip(groups, entries, strict=True):
        for key, (value, kept) in values.items():
            if isinstance(value, Tensor):
                if value._version != kept[0]:
                    value.copy_(kept[1])
                group[key] = value
            else:
                group[key] = value if kept is None else copy.deepcopy(kept)
