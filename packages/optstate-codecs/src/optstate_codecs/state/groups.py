"""Merging saved param groups, of a state dict or a manifest, into those of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any

__all__ = ["merged_groups"]

Group = dict[str, Any]


def merged_groups(
    where: str,
    groups: Sequence[Group],
    saved_groups: Sequence[Mapping[str, Any]],
    *,
    required: Sequence[str] = (),
    keep: Collection[str] = (),
    convert: Callable[[str, Any], Any] = lambda key, value: deepcopy(value),
    check: Callable[[Group, Mapping[str, Any]], None] | None = None,
) -> list[Group]:
    """New groups with the saved values, and with the optimizer's own where none was saved.

    Args:
        where: names the saved groups in messages.
        groups: of the optimizer; not changed.
        saved_groups: one for each; ``params`` holds one item per parameter, or their count.
        required: keys that every saved group must have, besides ``params``.
        keep: keys whose saved values are ignored, besides ``params``.
        convert: makes a value of the new group from its key and the saved value.
        check: raises unless the new group (first argument) fits the saved one (second).

    Raises:
        KeyError: a required key is missing.
        TypeError, ValueError: the groups differ in number or size, or ``check`` raised it; the
            message names the group.
    """
    if len(saved_groups) != len(groups):
        raise ValueError(f"{where}: {len(saved_groups)} groups, must be {len(groups)}")
    merged = []
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if missing := [key for key in ("params", *required) if key not in saved]:
            raise KeyError(f"{where}[{i}]: missing key {missing[0]!r}")
        count = saved["params"] if isinstance(saved["params"], int) else len(saved["params"])
        if count != len(group["params"]):
            raise ValueError(
                f"{where}[{i}]['params']: {count} parameters, must be {len(group['params'])}"
            )
        ignored = {"params", *keep}
        new = {**group, **{k: convert(k, v) for k, v in saved.items() if k not in ignored}}
        if check is not None:
            try:
                check(new, saved)
            except OverflowError as error:
                raise ValueError(f"{where}[{i}]: {error}") from error
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}[{i}]: {error}") from error
        merged.append(new)
    return merged
