"""The mapping behind ``OptimizerWrapper.state``, which decodes a state when it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from optstate_wrap.state.decoded import DecodedStates

__all__ = ["StateView"]


class StateView(MutableMapping[Any, dict[str, Any]]):
    """Decoded states by parameter; see ``OptimizerWrapper.state``.

    The state of a parameter without any is an empty dict.
    """

    def __init__(self, states: DecodedStates) -> None:
        self._states = states

    def __getitem__(self, key: Any) -> dict[str, Any]:
        if isinstance(key, Tensor):
            return self._states.read(key)
        value: dict[str, Any] = self._states.extra[key]
        return value

    def __setitem__(self, key: Any, value: Mapping[str, Any]) -> None:
        if isinstance(key, Tensor):
            self._states.write(key, value if isinstance(value, dict) else dict(value))
        else:
            self._states.extra[key] = value

    def __delitem__(self, key: Any) -> None:
        if isinstance(key, Tensor):
            self._states.drop(key)
        else:
            del self._states.extra[key]

    def __iter__(self) -> Iterator[Any]:
        yield from self._states
        yield from self._states.extra

    def __len__(self) -> int:
        return len(self._states) + len(self._states.extra)

    def __contains__(self, key: object) -> bool:
        return key in (self._states if isinstance(key, Tensor) else self._states.extra)

    def get(self, key: Any, default: Any = None) -> Any:
        """The state of a parameter, or ``default`` if it has none."""
        if key in self:
            return self[key]
        return default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The state of a parameter; if it has none, set it to ``default`` first."""
        if key not in self:
            self[key] = {} if default is None else default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove the state of a parameter and return it, or ``default`` if it has none."""
        if key not in self and default:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def clear(self) -> None:
        """Remove the state of all parameters."""
        self._states.clear()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} parameters)"
