"""Converts numbers of other libraries to plain Python values before they are kept or saved.

A numpy scalar computes like a number, but ``torch.load(weights_only=True)`` and JSON reject it, and
a float32 one rounds the numbers combined with it. So hyper-parameters become ints, floats, bools
and tuples of them when they are passed, and again when a state dict or a manifest is made, since a
scheduler may assign any value to a param group in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from operator import index
from typing import Any

import numpy
from torch import Tensor

__all__ = ["PlainFields", "plain_value"]

_PLAIN = frozenset((float, int, bool, str, type(None)))


def _plain_already(values: Iterable[Any]) -> bool:
    return _PLAIN.issuperset(map(type, values))


def plain_value(value: Any) -> Any:
    """The value, with numbers of other libraries replaced by plain Python numbers.

    Numpy scalars and arrays, other real and integer types, and objects with ``__index__`` become
    ints, floats and bools; a sequence that is neither tuple nor list becomes a tuple; dicts, lists
    and tuples are converted inside. Tensors and everything else are returned as they are.

    Examples:
        >>> plain_value({"lr": numpy.float64(0.5), "betas": [numpy.float32(0.5), 0.75]})
        {'lr': 0.5, 'betas': [0.5, 0.75]}
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        return value if _plain_already(value) else kind([plain_value(item) for item in value])
    if isinstance(value, Tensor):
        return value
    if kind is dict:
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, (numpy.generic, numpy.ndarray)):
        return _of_numpy(value)
    if isinstance(value, Integral) or (hasattr(kind, "__index__") and not hasattr(kind, "shape")):
        return index(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return tuple(map(plain_value, value))
    return value


def _of_numpy(value: Any) -> Any:
    """Numbers, bools and text of numpy as Python's; anything else unchanged."""
    if value.dtype.kind not in "biufU":
        return value
    if value.ndim:
        return tuple(map(_of_numpy, value))
    # item() of a long double returns a long double
    return float(value) if value.dtype.kind == "f" else value.item()


class PlainFields:
    """Base of frozen dataclasses whose fields are converted to plain values."""

    def __post_init__(self) -> None:
        fields = self.__dict__
        # every step creates hyper-parameters and formats, nearly always from plain values
        if _plain_already(fields.values()):
            return
        for name, value in fields.items():
            if type(value) not in _PLAIN:
                fields[name] = plain_value(value)
