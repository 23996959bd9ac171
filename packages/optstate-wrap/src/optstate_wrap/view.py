"""The state of a wrapped optimizer as a mapping that decodes what is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from optstate_wrap.engine import Engine

__all__ = ["StateView"]


class StateView(MutableMapping[Any, dict[str, Any]]):
    """By parameter, its state as the inner optimizer keeps it: decoded, in copies.

    Changing what it returns changes nothing; assigning a whole state does. A parameter without
    state has an empty one, as in ``torch.optim``.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getitem__(self, key: Any) -> dict[str, Any]:
        engine = self._engine
        if not isinstance(key, Tensor):
            value: dict[str, Any] = engine.extra[key]
            return value
        if key not in engine.store:
            return {}
        return engine.states(key, engine.kept_pieces(key))

    def __setitem__(self, key: Any, value: Mapping[str, Any]) -> None:
        engine = self._engine
        if isinstance(key, Tensor):
            engine.put(key, engine.pieces_of(key), value)
        else:
            engine.extra[key] = value

    def __delitem__(self, key: Any) -> None:
        if isinstance(key, Tensor):
            self._engine.store.drop(key)
        else:
            del self._engine.extra[key]

    def __iter__(self) -> Iterator[Any]:
        yield from self._engine.store
        yield from self._engine.extra

    def __len__(self) -> int:
        return len(self._engine.store) + len(self._engine.extra)

    def __contains__(self, key: object) -> bool:
        return (key in self._engine.store) if isinstance(key, Tensor) else key in self._engine.extra

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} parameters)"
