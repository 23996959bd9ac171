"""Parses text into arguments of an optimizer, by the types in its signature.

Launchers and configuration files pass text: ``block_size=256,betas=(0.9,0.95)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from optstate_codecs.arguments import arguments_of, unknown_argument

__all__ = ["typed_arguments", "typed_texts"]

FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
BRACKETS = {"(": ")", "[": "]", "{": "}"}


def typed_arguments(cls: type, given: Mapping[str, Any] | str) -> dict[str, Any]:
    """Parse the text of arguments for an optimizer's class.

    The annotation of the argument decides how its text is read: numbers in Python's syntax;
    ``true``, ``false``, ``yes``, ``no``, ``1`` and ``0`` for flags; ``none`` where None is allowed;
    ``0.9,0.95``, with or without brackets, for several numbers; and for a mapping, such as
    ``formats``, ``{exp_avg: bf16, exp_avg_sq: dynamic8(signed=False)}``. Quotes around a text are
    removed. The constructor checks ranges.

    Args:
        cls: of the family, or any optimizer with annotations or defaults, ``torch.optim``'s too.
        given: by name; values that are not text are returned unchanged. Or one text of
            ``name=value`` separated by commas; a comma inside brackets, or not followed by
            ``name=value``, belongs to the value.

    Returns:
        Keyword arguments for ``cls``, without its parameters.

    Raises:
        TypeError: ``cls`` does not take an argument, or text cannot express it.
        ValueError: a text is not of the argument's type.

    Examples:
        >>> typed_arguments(torch.optim.AdamW, "lr=3e-4,betas=(0.9,0.95),fused=none")
        {'lr': 0.0003, 'betas': (0.9, 0.95), 'fused': None}
    """
    types = arguments_of(cls)
    items = dict(_named(given)) if isinstance(given, str) else given
    for name in items:
        if name not in types:
            raise unknown_argument(cls, name, types)
    return {
        name: _typed(name, value, types[name]) if isinstance(value, str) else value
        for name, value in items.items()
    }


def typed_texts(optimizer_class: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` with text read by ``typed_arguments``; all others are returned unchanged."""
    texts = {name: value for name, value in arguments.items() if isinstance(value, str)}
    return {**arguments, **typed_arguments(optimizer_class, texts)}


def _named(text: str) -> Iterator[tuple[str, str]]:
    """Names and values of ``name=value, ...``; each name once."""
    found: dict[str, str] = {}
    last = None
    for part in _split(text, ","):
        name, equals, value = part.partition("=")
        if not part.strip():
            continue
        if equals and name.strip().isidentifier():
            last = name.strip()
            if last in found:
                raise ValueError(f"{last}: given twice in {text!r}")
            found[last] = value
        elif last is not None:
            found[last] += f",{part}"
        else:
            raise ValueError(f"{part.strip()!r}: must be name=value, separated by commas")
    yield from found.items()


def _split(text: str, separator: str) -> list[str]:
    """``text`` cut at every ``separator`` that is not inside brackets."""
    parts, closing = [""], list[str]()
    for letter in text:
        if letter == separator and not closing:
            parts.append("")
            continue
        if letter in BRACKETS:
            closing.append(BRACKETS[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        parts[-1] += letter
    return parts


def _typed(name: str, text: str, kind: Any) -> Any:
    text = _unquoted(text)
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if NoneType in kinds and text.lower() == "none":
        return None
    for one in kinds:
        read = _READERS.get(get_origin(one) or one)
        if read is not None:
            return read(name, text, one)
    raise TypeError(f"{name}={text!r}: cannot be given as text")


def _unquoted(text: str) -> str:
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted and text[0] not in text[1:-1] else text


def _flag(name: str, text: str, kind: Any) -> bool:
    if text.lower() not in FLAGS:
        raise ValueError(f"{name}={text!r}: must be one of {', '.join(FLAGS)}")
    return FLAGS[text.lower()]


def _number(name: str, text: str, kind: Any) -> int | float:
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        noun = "an int" if kind is int else "a number"
        raise ValueError(f"{name}={text!r}: must be {noun}") from None


def _inside(text: str, opening: str) -> str:
    """``text`` without the brackets around it, if there are any."""
    if len(text) > 1 and text[0] in opening and text[-1] == BRACKETS[text[0]]:
        return text[1:-1]
    return text


def _several(name: str, text: str, kind: Any) -> tuple[Any, ...]:
    kinds = get_args(kind) or (float, ...)
    parts = [part for part in _split(_inside(text, "(["), ",") if part.strip()]
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(parts)
    if len(parts) != len(kinds):
        raise ValueError(f"{name}={text!r}: must be {len(kinds)} values, separated by commas")
    pairs = zip(parts, kinds, strict=True)
    return tuple(_typed(f"{name}[{i}]", part, one) for i, (part, one) in enumerate(pairs))


def _mapping(name: str, text: str, kind: Any) -> dict[str, Any]:
    found = {}
    for part in filter(str.strip, _split(_inside(text, "{"), ",")):
        key, colon, value = part.partition(":")
        if not colon:
            raise ValueError(f"{name}={text!r}: must be {{name: value, ...}}, got {part.strip()!r}")
        found[_unquoted(key)] = _unquoted(value)
    return found


_READERS: dict[Any, Callable[[str, str, Any], Any]] = {
    bool: _flag,
    int: _number,
    float: _number,
    str: lambda name, text, kind: text,
    tuple: _several,
    Mapping: _mapping,
}
