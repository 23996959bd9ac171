"""Param group values for a manifest, and the detection of changes to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from optstate_codecs.formats import Format
from optstate_codecs.plain import plain_value

__all__ = ["UNSAID", "Group", "GroupValues", "plain"]

Group = dict[str, Any]
# not in a manifest as they are; names belong to the model and may change
UNSAID = ("params", "param_names")
_unknown = object()


def plain(group: Mapping[str, Any]) -> Group:
    """A group's values as JSON values, and its number of parameters; other objects are left out."""
    values = {key: _plain(value) for key, value in group.items() if key not in UNSAID}
    kept = {key: value for key, value in values.items() if value is not _unknown}
    return {**kept, "params": len(group["params"])}


def _plain(value: Any) -> Any:
    value = plain_value(value)
    if isinstance(value, Format):
        return value.spec
    if isinstance(value, dict):
        items: Any = {str(key): _plain(item) for key, item in value.items()}
        return _unknown if _unknown in items.values() else items
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return _unknown if _unknown in items else items
    if value is None or isinstance(value, (str, int, float)):
        return value
    found = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return found if isinstance(found, (int, float)) else _unknown


class GroupValues:
    """The values in an optimizer's param groups, for a manifest.

    Args:
        groups: ``optimizer.param_groups``.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._groups = groups
        self._taken: list[Any] | None = None

    def take(self) -> list[Group]:
        """The values as they are now; waits for tensors on a device."""
        self._taken = self._marks()
        return [plain(group) for group in self._groups]

    def forget(self) -> None:
        """Report no change until the values are taken again."""
        self._taken = None

    def changed(self) -> bool:
        """Whether a value has changed since the values were taken.

        This does not wait for a device: a tensor has changed if it was written to. Added or larger
        groups do not count, since a manifest has no state of their new parameters yet.
        """
        if self._taken is None:
            return False
        marks = self._marks()
        sizes = [[params for params, _ in each] for each in (self._taken, marks)]
        return sizes[0] == sizes[1] and marks != self._taken

    @property
    def on_device(self) -> bool:
        """Whether ``take`` may wait for a device."""
        return any(_on_device(value) for group in self._groups for value in group.values())

    def _marks(self) -> list[Any]:
        return [
            (len(group["params"]), {k: _mark(v) for k, v in group.items() if k not in UNSAID})
            for group in self._groups
        ]


def _mark(value: Any) -> Any:
    """A value to compare: it differs if the group's value differs or was written to."""
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, dict):
        return {key: _mark(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark(item) for item in value]
    return plain_value(value)


def _on_device(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_on_device, value))
    return isinstance(value, Tensor) and value.device.type != "cpu"
