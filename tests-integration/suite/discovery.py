"""Finds the public optimizers of every distribution.

The distributions are the packages of this checkout and those whose installed metadata has the entry
point group ``optstate.optimizers``, so that an editable install and a bare PYTHONPATH both work. A
public optimizer is a name in ``__all__`` that is an optimizer's class or a function whose return
annotation is one. What takes neither parameters nor an optimizer first is an error, not left out.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from torch.optim import Optimizer

__all__ = ["GROUP", "Public", "modules", "public_optimizers"]

GROUP = "optstate.optimizers"
ROOT = Path(__file__).parents[2]
#: by the name of the first argument, what is made of a public name
FIRST_ARGUMENTS = ("params", "optimizer", "optimizer_class")


@dataclass(frozen=True)
class Public:
    """A public optimizer.

    Attributes:
        name: module and name, e.g. "lowbit_adam.AdamW8bit".
        make: the class, or the function that makes one.
        takes: the name of the first argument.
        inner: the class that the first argument has to be of, or None.
        base: the public class it is another name of, or None.
    """

    name: str
    make: Callable[..., Any]
    takes: str
    inner: type | None = None
    base: type | None = None


def modules() -> list[str]:
    """The import names of the distributions."""
    here = {path.name for path in ROOT.glob("packages/*/src/*") if path.is_dir()}
    declared = {entry.module for entry in entry_points(group=GROUP)}
    return sorted(here | declared)


def _returned(value: Any) -> Any:
    """The class that a call of ``value`` makes, or None."""
    if isinstance(value, type):
        return value
    if not inspect.isfunction(value):
        return None
    found = get_type_hints(value).get("return")
    return get_args(found)[0] if get_origin(found) is type else found


def _first(value: Any) -> tuple[str, Any]:
    """The name of the first argument, and the class it is of."""
    first = next(iter(inspect.signature(value).parameters), "")
    function = value.__init__ if isinstance(value, type) else value
    hint = get_type_hints(function).get(first)
    return first, get_args(hint)[0] if get_origin(hint) is type else hint


def own_attributes(value: type) -> set[str]:
    """The names that a class defines.

    torch gives the class of the first optimizer its inherited ``step`` again, with hooks.
    """
    own = set(vars(value))
    if "step" in own and len(value.__bases__) == 1:
        inherited = getattr(value.__bases__[0], "step", None)
        if inherited and inspect.unwrap(vars(value)["step"]) is inspect.unwrap(inherited):
            own.remove("step")
    return own


def _base(value: Any) -> type | None:
    """The class that ``value`` is another name of: it adds nothing but its documentation."""
    own = own_attributes(value) if isinstance(value, type) else {"__init__"}
    added = {name for name in own if not (name.startswith("__") and name.endswith("__"))}
    added -= {name for name in own if name.startswith("_abc_")}
    if added or "__init__" in own or len(value.__bases__) != 1:
        return None
    return value.__bases__[0]


def public_optimizers(names: Iterable[str] | None = None) -> list[Public]:
    """The public optimizers of these modules, or of all; sorted by name."""
    found = [entry for name in names or modules() for entry in _of_module(name)]
    return sorted(found, key=lambda public: public.name)


def _of_module(name: str) -> Iterator[Public]:
    module = sys.modules.get(name) or import_module(name)
    for key in getattr(module, "__all__", ()):
        value = getattr(module, key)
        made = _returned(value)
        if not (isinstance(made, type) and issubclass(made, Optimizer)):
            continue
        first, inner = _first(value)
        if first not in FIRST_ARGUMENTS:
            allowed = ", ".join(FIRST_ARGUMENTS)
            raise TypeError(f"{name}.{key}: its first argument is {first!r}, not one of {allowed}")
        inner = inner if isinstance(inner, type) and first != "params" else None
        base = _base(value)
        public = base if base in vars(module).values() else None
        yield Public(f"{name}.{key}", value, first, inner, public)
