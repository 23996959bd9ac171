"""The number that keys the random numbers of each parameter, beside seed, step and element.

A parameter without a name is numbered by its index in its optimizer. Optimizers of one parameter
each then number all of them 0, and draw the same noise for each. So a parameter with a name is
numbered by a hash of the name, the same in every process and version of Python, and the group
option ``rounding_key`` tells apart what has no name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from optstate_codecs import checks
from optstate_codecs.plain import plain_value

__all__ = ["KeySource", "check_random", "rounding_keys"]

Groups = Sequence[Mapping[str, Any]]


def check_random(group: Mapping[str, Any]) -> None:
    """Raise unless the seed, the key and the names of a group are valid.

    Raises:
        TypeError, ValueError: one is not; the message names it.
    """
    checks.whole_number("rounding_seed", group["rounding_seed"])
    _check_key(group.get("rounding_key"))
    _check_names(group)


def _check_key(value: Any) -> None:
    key = plain_value(value)
    if isinstance(key, str) and not key:
        raise ValueError("rounding_key='': must be None, an int or text that is not empty")
    if isinstance(key, bool) or not isinstance(key, (int, str, type(None))):
        got = type(value).__name__
        raise TypeError(f"rounding_key={value!r}: must be None, an int or text, got {got}")
    if isinstance(key, int):
        checks.whole_number("rounding_key", key)


def _check_names(group: Mapping[str, Any]) -> None:
    names = group.get("param_names")
    if names is not None and not isinstance(names, (list, tuple)):
        raise TypeError(f"param_names={names!r:.80}: must be a list, got {type(names).__name__}")


def _names_of(group: Mapping[str, Any]) -> Sequence[Any]:
    """A name or None for each parameter; names that are not one for each are of other parameters.

    ``ZeroRedundancyOptimizer`` makes such groups, with a part of the parameters and all names.
    """
    names, count = group.get("param_names") or (), len(group["params"])
    return names if len(names) == count else [None] * count


def rounding_keys(groups: Groups) -> list[int]:
    """The number of each parameter, from 0 to 2^63 - 1, counted over all groups.

    With a name it is a hash of the name, and of how many parameters before it have the same name;
    without one it is the parameter's index. With ``rounding_key`` in its group it is a hash of that
    and the name, or without a name the position in the group.
    """
    keys: list[int] = []
    seen = Counter[tuple[str, ...]]()
    for group in groups:
        key = group.get("rounding_key")
        for position, name in enumerate(_names_of(group)):
            if key is None and name is None:
                keys.append(len(keys))
                continue
            parts: tuple[str, ...]
            parts = ("name", str(name)) if name is not None else ("position", str(position))
            if key is not None:
                parts = ("key", str(key), *parts)
            keys.append(_hash(*parts, str(seen[parts])))
            seen[parts] += 1
    return keys


def _hash(*parts: str) -> int:
    """63 bits of BLAKE2b of the parts, each after its length in bytes."""
    hashed = blake2b(digest_size=8)
    for part in parts:
        text = part.encode("utf-8", "surrogatepass")
        hashed.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(hashed.digest(), "little") >> 1


class KeySource:
    """The numbers of an optimizer's parameters, made again where names or options have changed."""

    def __init__(self) -> None:
        self._made_from: list[tuple[Any, ...]] = []
        self._keys: list[int] | None = None

    def changed(self, groups: Groups) -> bool:
        """Whether names, options or sizes of groups are others than at the last call.

        Added groups do not count. Nor do other names in the same list: no work is done for each
        parameter here.
        """
        now = [(g.get("param_names"), g.get("rounding_key"), len(g["params"])) for g in groups]
        before, self._made_from = self._made_from, now
        if before == now:
            return False
        self._keys = None
        return before[: len(now)] != now[: len(before)]

    def keys(self, groups: Groups) -> list[int]:
        """``rounding_keys`` of the groups that ``changed`` has seen last."""
        if self._keys is None:
            self._keys = rounding_keys(groups)
        return self._keys
