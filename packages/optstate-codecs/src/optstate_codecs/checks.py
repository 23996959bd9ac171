"""Validation of user arguments: messages name the argument, its value and the allowed values.

Numbers of other libraries, such as numpy's, are accepted. Checks of values that are not tensors
return them as plain Python values (see ``optstate_codecs.plain``), for the caller to keep.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.plain import plain_value

__all__ = [
    "betas",
    "block_size",
    "flag",
    "nonnegative",
    "one_of",
    "positive",
    "share",
    "unit_interval",
    "whole_number",
]

_LARGE = 1 << 63
_LARGEST = 2.0**60


def _number(name: str, value: Any) -> float | None:
    """The value as a number, or None for a tensor that the host should not read."""
    if type(value) is float:
        return value
    if type(value) is int:
        # tensors take no larger ints, and no float is as large as some
        return value if -_LARGE < value < _LARGE else math.copysign(math.inf, value)
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{name}: must be a number or a one-element real tensor, "
                f"got shape {tuple(value.shape)} and dtype {value.dtype}"
            )
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return float(value)
    number = plain_value(value)
    if type(number) is not float and type(number) is not int:
        raise TypeError(f"{name}={value!r}: must be a number, got {type(value).__name__}")
    return number


def nonnegative(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number or one-element tensor from 0 to 2^60.

    The product of two such numbers is still a float32 number.
    """
    number = _number(name, value)
    if number is not None and not 0.0 <= number <= _LARGEST:
        most = " and at most 2**60" if _LARGEST < number < math.inf else ""
        raise ValueError(f"{name}={value!r}: must be finite and at least 0{most}")


def positive(name: str, value: Any) -> float:
    """Raise unless ``value`` is a finite number above zero, and not a tensor."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: must be a number, got Tensor")
    number = _number(name, value)
    if number is None or not (math.isfinite(number) and number > 0.0):
        raise ValueError(f"{name}={value!r}: must be finite and above 0")
    return number


def unit_interval(name: str, value: Any) -> None:
    """Raise unless ``value`` is a number or one-element tensor in [0, 1)."""
    number = _number(name, value)
    if number is not None and not 0.0 <= number < 1.0:
        raise ValueError(f"{name}={value!r}: must be in [0, 1)")


def share(name: str, value: Any) -> float:
    """Raise unless ``value`` is a number from 0 to 1, and not a tensor."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: must be a number, got Tensor")
    number = _number(name, value)
    if number is None or not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}={value!r}: must be from 0 to 1")
    return number


def betas(value: Any, count: int) -> None:
    """Raise unless ``value`` is a sequence of ``count`` decay rates, each in [0, 1)."""
    rates = value if type(value) is tuple else plain_value(value)
    if not isinstance(rates, (tuple, list)) or len(rates) != count:
        words = {2: "two", 3: "three"}
        raise ValueError(f"betas={value!r}: must be {words[count]} numbers in [0, 1)")
    for i, beta in enumerate(rates):
        unit_interval(f"betas[{i}]", beta)


def flag(name: str, value: Any) -> bool:
    """Raise unless ``value`` is True or False."""
    given = value if type(value) is bool else plain_value(value)
    if type(given) is not bool:
        raise TypeError(f"{name}={value!r}: must be True or False, got {type(value).__name__}")
    return given


def whole_number(name: str, value: Any) -> int:
    """Raise unless ``value`` is an int from 0 to 2^63 - 1."""
    number = _int(name, value)
    if not 0 <= number < 2**63:
        raise ValueError(f"{name}={value!r}: must be from 0 to 2**63 - 1")
    return number


def block_size(value: Any, name: str = "block_size") -> int:
    """Raise unless ``value`` is a power of two from 16 to 8192 (elements)."""
    size = _int(name, value)
    if not 16 <= size <= 8192 or size & (size - 1):
        raise ValueError(f"{name}={value}: must be a power of two from 16 to 8192")
    return size


def _int(name: str, value: Any) -> int:
    number = value if type(value) is int else plain_value(value)
    if type(number) is not int:
        raise TypeError(f"{name}={value!r}: must be an int, got {type(value).__name__}")
    return number


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise unless ``value`` is one of those ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")
