"""The state of a wrapped optimizer as a mapping that decodes what is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from optstate_wrap.state.decoded import DecodedStates

__all__ = ["StateView"]


class StateView(MutableMapping[Any, dict[str, Any]]):
    """By parameter, its state as the inner optimizer keeps it; see ``OptimizerWrapper.state``.

    A parameter without state has an empty one.
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
        """The state of a parameter, or ``default`` where there is none."""
        if key in self:
            return self[key]
        return default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The state of a parameter, which is ``default`` from now on where there is none."""
        if key not in self:
            self[key] = {} if default is None else default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        """Forget the state of a parameter and return it, or ``default`` where there is none."""
        if key not in self and default:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def clear(self) -> None:
        """Forget every state."""
        self._states.clear()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} parameters)"
