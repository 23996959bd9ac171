"""The registry of formats by name, and parsing them: ``parse_format("dynamic8(signed=False)")``."""

from __future__ import annotations

import ast
import re
from functools import cache, lru_cache
from importlib.metadata import entry_points
from typing import TypeVar

from optstate_codecs.formats.base import Format
from optstate_codecs.formats.cast import BF16, FP32
from optstate_codecs.formats.costate import CoState
from optstate_codecs.formats.dynamic import Dynamic8
from optstate_codecs.formats.fp8 import FP8
from optstate_codecs.formats.fp16 import FP16
from optstate_codecs.formats.linear import Int4, Int8
from optstate_codecs.formats.minifloat import Minifloat
from optstate_codecs.formats.oneq import OneQ
from optstate_codecs.formats.table4 import Dynamic4, Linear4

__all__ = ["as_format", "format_names", "parse_format", "register_format"]

_BUILT_IN: tuple[type[Format], ...] = (
    FP32,
    BF16,
    FP16,
    Int8,
    Int4,
    Dynamic8,
    FP8,
    Minifloat,
    CoState,
    OneQ,
    Dynamic4,
    Linear4,
)
# of an option's text: a longer one can be nested so deeply that parsing it ends the process
LONGEST = 64
_SPEC = re.compile(r"(\w+)(?:\((.*)\))?")
AnyFormat = TypeVar("AnyFormat", bound=type[Format])


@cache
def _classes() -> dict[str, type[Format]]:
    """Built-in formats, and those of installed packages' entry points ``optstate.formats``."""
    classes = {cls.name: cls for cls in _BUILT_IN}
    for entry in entry_points(group="optstate.formats"):
        classes.setdefault(entry.name, entry.load())
    return classes


def format_names() -> tuple[str, ...]:
    """The names that ``parse_format`` accepts, sorted."""
    return tuple(sorted(_classes()))


def register_format(cls: AnyFormat) -> AnyFormat:
    """Make a format known under its ``name``, as optimizers need it to keep and save its text.

    An installed package may name its formats under the entry point group ``optstate.formats``
    instead. A class that is defined anew, as in a notebook, replaces the earlier one.

    Args:
        cls: a frozen dataclass, with a ``name`` of letters, digits and underscores.

    Returns:
        The class, so that this works as a decorator.

    Raises:
        TypeError: it is not a class of formats.
        ValueError: its name is no word, or another format's.

    Examples:
        >>> @register_format
        ... @dataclass(frozen=True)
        ... class Log8(Format):
        ...     name = "log8"
    """
    if not (isinstance(cls, type) and issubclass(cls, Format)):
        raise TypeError(f"cls={cls!r}: must be a subclass of Format")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ValueError(f"{cls.__name__}.name={name!r}: must be letters, digits and underscores")
    other = _classes().get(name, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{cls.__name__}.name={name!r}: is the name of {other.__qualname__}")
    _classes()[name] = cls
    parse_format.cache_clear()
    return cls


@lru_cache(maxsize=1024)
def parse_format(spec: str) -> Format:
    """Build a format from its text, the inverse of ``Format.spec``.

    Args:
        spec: a name, or a name with options: ``int8(block_size=64, rounding=stochastic)``.

    Returns:
        The format. Equal texts give equal formats.

    Raises:
        ValueError: the name or an option is unknown, or the format rejects a value.

    Examples:
        >>> parse_format("dynamic8(block_size=256)").nbytes(4096)
        4160
    """
    match = _SPEC.fullmatch(spec.strip())
    cls = _classes().get(match.group(1)) if match else None
    if match is None or cls is None:
        raise ValueError(
            f"format={spec!r}: must be one of {', '.join(format_names())}; register_format adds one"
        )
    known = [option.name for option in cls.options()]
    options = {}
    for item in filter(None, (match.group(2) or "").split(",")):
        key, _, text = (part.strip() for part in item.partition("="))
        if key not in known:
            raise ValueError(f"format={spec!r}: option {key!r} must be one of {', '.join(known)}")
        if len(text) > LONGEST:
            raise ValueError(f"format={spec!r:.80}: option {key!r} has {len(text)} characters")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            options[key] = text
    return cls(**options)


def as_format(value: Format | str) -> Format:
    """The format that a text describes.

    Args:
        value: such a text, or a format, which is returned itself.
    """
    if isinstance(value, Format):
        return value
    if isinstance(value, str):
        return parse_format(value)
    raise TypeError(f"format={value!r}: must be a Format or its text, got {type(value).__name__}")
