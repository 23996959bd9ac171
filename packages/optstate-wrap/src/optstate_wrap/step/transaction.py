"""Undoes a failed step, so that each parameter is either before its step or after it.

``Transaction`` covers the parameters and their records, ``guarded_inner`` the inner optimizer's
groups and hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_wrap.hooks import STEP_HOOKS, without_hooks
from optstate_wrap.state.param_chunks import ParamChunk
from optstate_wrap.state.record import Record
from optstate_wrap.state.store import Store
from optstate_wrap.step.scratch import Scratch

__all__ = ["Transaction", "group_changes", "guarded_inner", "restore_groups", "set_entries"]

# a split parameter of at most this size is saved on its device, a larger one on the host
UNDO_BYTES = 1 << 26


class Transaction:
    """Keeps the old values of parameters until the new records of all their chunks are stored.

    Attributes:
        done: numbers of the parameters whose step is complete.
    """

    def __init__(self, store: Store, scratch: Scratch) -> None:
        self.store = store
        self.scratch = scratch
        self.done: list[int] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._new: dict[Tensor, list[Record]] = {}
        self._numbers: dict[Tensor, int] = {}

    def keep(self, batch: Sequence[ParamChunk], state: Sequence[Tensor]) -> None:
        """Copy what a step of ``batch`` changes in place: the parameters, and tensors of state.

        If state is on the host, the copies of a very large parameter go there too: until all its
        chunks are stepped, they would take more device memory than the state in transit.
        """
        near, far = list(state), list[Tensor]()
        for chunk in batch:
            large = chunk.parts > 1 and chunk.param.nbytes > UNDO_BYTES
            (far if large and self.store.name == "host" else near).append(chunk.data())
        for tensors, on_host in ((near, False), (far, True)):
            if tensors:
                copies = self.scratch.copies_of(tensors, on_host)
                self._before += zip(tensors, copies, strict=True)

    def add(self, batch: Sequence[ParamChunk], records: Sequence[Record]) -> None:
        """Take the new records of the stepped chunks of a batch."""
        moved = self.store.to_store([[record] for record in records])
        for chunk, (record,) in zip(batch, moved, strict=True):
            self._new.setdefault(chunk.param, []).append(record)
            self._numbers[chunk.param] = chunk.number

    def commit(self, batch: Sequence[ParamChunk]) -> None:
        """Store all new records, if the last parameter of ``batch`` is complete."""
        if not batch or not batch[-1].last:
            return
        new, self._new = self._new, {}
        # a parameter for which the optimizer keeps no state has no record
        params = [param for param, records in new.items() if any(records)]
        self.store.swap(params, [new[param] for param in params])
        self.done += self._numbers.values()
        self._before.clear()
        self.scratch.reset()
        self._numbers.clear()

    def roll_back(self) -> None:
        """Undo the steps that are not committed."""
        for data, before in self._before:
            data.copy_(before)
        for records in self._new.values():
            self.store.discard(records)


@contextmanager
def guarded_inner(inner: Optimizer) -> Iterator[list[dict[str, Any]]]:
    """Inside, the inner optimizer has no step hooks; afterwards, it has its own groups again.

    An exception also restores the groups' values.

    Yields:
        the groups' values before, for ``restore_groups``.
    """
    groups, state = inner.param_groups, inner.state
    lists = [group["params"] for group in groups]
    before = snapshot(groups)
    try:
        with without_hooks(inner, STEP_HOOKS):
            yield before
    except BaseException:
        restore_groups(groups, before)
        raise
    finally:
        inner.param_groups, inner.state = groups, state
        for group, params in zip(groups, lists, strict=True):
            group["params"] = params


def snapshot(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups' values except their parameters, with copies of those that can change in place."""
    return [
        {key: (value, _saved(value)) for key, value in group.items() if key != "params"}
        for group in groups
    ]


def _saved(value: Any) -> Any:
    """A copy of a value that can change in place, with a tensor's version; None for others."""
    if isinstance(value, Tensor):
        return value._version, value.detach().clone()
    if isinstance(value, (list, dict, set)):
        return copy.deepcopy(value)
    return None


def restore_groups(groups: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> None:
    """Give the groups the same objects with the same values as in a snapshot, and no others."""
    for group, values in zip(groups, before, strict=True):
        for key in [key for key in group if key != "params" and key not in values]:
            del group[key]
    set_entries(groups, before)


def group_changes(
    groups: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The entries of a new snapshot that differ from the snapshot ``before``."""
    return [
        {key: entry for key, entry in new.items() if key not in old or _differ(entry, old[key])}
        for new, old in zip(snapshot(groups), before, strict=True)
    ]


def _differ(entry: tuple[Any, Any], old: tuple[Any, Any]) -> bool:
    value, saved = entry
    if value is not old[0]:
        return True
    # tensors are compared by version; a container may have changed in place
    return saved is not None and (not isinstance(value, Tensor) or bool(saved[0] != old[1][0]))


def set_entries(groups: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> None:
    """Set the entries of a snapshot in the groups; other values stay."""
    for group, values in zip(groups, entries, strict=True):
        for key, (value, saved) in values.items():
            if isinstance(value, Tensor):
                if value._version != saved[0]:
                    value.copy_(saved[1])
                group[key] = value
            else:
                group[key] = value if saved is None else copy.deepcopy(saved)
