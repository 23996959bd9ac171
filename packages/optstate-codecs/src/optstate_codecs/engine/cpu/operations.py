"""The C++ form of each torch operation; ``prelude`` has the functions that they call.

An expression stands for one value or for a vector of them. Values are floats or 32-bit integers:
integers of every width are int32_t, a uint8 within 0 to 255, and a bfloat16 is an int32_t with its
16 bits. Products and sums round as torch's vectorised loops do on
this processor: once, by a fused multiply-add, or twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from optstate_codecs.engine.cpu.record import Unrecordable
from optstate_codecs.exact import rounds_once

__all__ = ["C_TYPES", "OPERATIONS", "STORED", "VECTORS", "bits_type", "convert", "literal"]

C_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "int32_t",
    torch.int32: "int32_t",
    torch.int16: "int32_t",
    torch.int8: "int32_t",
    torch.uint8: "int32_t",
    torch.bool: "bool",
}

# the vectors of the same in ``prelude``
VECTORS = {"float": "F", "int32_t": "I", "bool": "M"}

# in memory
STORED = {
    torch.float32: "float",
    torch.bfloat16: "uint16_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
}


def literal(value: Any, dtype: torch.dtype) -> str:
    """A Python number as a C constant of ``dtype``."""
    if dtype != torch.float32:
        whole = int(value)
        return f"((int32_t){whole & 0xFFFFFFFF}u)" if abs(whole) > 2**30 else f"({whole})"
    number = float(torch.tensor(float(value), dtype=torch.float32, device="cpu"))
    if math.isnan(number):
        return '__builtin_nanf("")'
    if math.isinf(number):
        return "(-__builtin_inff())" if number < 0 else "__builtin_inff()"
    return f"({number.hex()}f)" if number >= 0 else f"(-{(-number).hex()}f)"


def convert(text: str, source: torch.dtype | None, target: torch.dtype) -> str:
    """The expression ``text`` of dtype ``source`` as ``target``."""
    if source == target or source is None:
        return text
    if source == torch.bfloat16:
        text, source = f"to_float({text})", torch.float32
        if target == torch.float32:
            return text
    if target == torch.bfloat16:
        return f"to_bf16({convert(text, source, torch.float32)})"
    if target == torch.bool:
        return f"(({text}) != 0)"
    if source == torch.bool:
        select = "select_f" if target == torch.float32 else "select_i"
        return f"{select}({text}, {literal(1, target)}, {literal(0, target)})"
    if target == torch.float32:
        return f"to_f({text})"
    if source == torch.float32:
        text = f"to_i({text})"
    return {
        torch.uint8: f"({text} & 255)",
        torch.int8: f"(shl({text}, 24) >> 24)",
        torch.int16: f"(shl({text}, 16) >> 16)",
    }.get(target, text)


def bits_type(text: str, source: torch.dtype, target: torch.dtype) -> str:
    """The bits of ``text``, of dtype ``source``, as ``target``."""
    if (source, target) == (torch.float32, torch.int32):
        return f"as_int({text})"
    if (source, target) == (torch.int32, torch.float32):
        return f"as_float({text})"
    if (source, target) == (torch.bfloat16, torch.int16):
        return convert(text, torch.int32, torch.int16)
    if (source, target) == (torch.int16, torch.bfloat16):
        return f"({text} & 0xffff)"
    raise Unrecordable(f"bits of {source} as {target}")


def _infix(sign: str) -> Callable[..., str]:
    return lambda args, kwargs, dtype: f"({args[0]} {sign} {args[1]})"


def _add(args: Sequence[str], kwargs: dict[str, Any], dtype: torch.dtype) -> str:
    alpha = kwargs.get("alpha", 1)
    if alpha == 1:
        return f"({args[0]} + {args[1]})"
    if dtype == torch.float32:
        # from exact.multiply_add; a rule's is an addcmul here, since its scalar is a tensor
        return f"fma_({args[1]}, {literal(alpha, dtype)}, {args[0]})"
    return f"({args[0]} + {args[1]} * {literal(alpha, dtype)})"


def _plain(function: Callable[..., str]) -> Callable[..., str]:
    """An operation without keywords, the same for all dtypes."""
    return lambda args, kwargs, dtype: function(*args)


def _either(floats: str, integers: str) -> Callable[..., str]:
    """A call of one C function for floats and of another for integers."""
    return lambda args, kwargs, dtype: (
        f"{floats if dtype == torch.float32 else integers}({', '.join(args)})"
    )


def _clamp(args: Sequence[str | None], kwargs: dict[str, Any], dtype: torch.dtype) -> str:
    low, high = [*args[1:], None, None][:2]
    low = kwargs.get("min") if low is None else low
    high = kwargs.get("max") if high is None else high
    names = ("at_least", "at_most") if dtype == torch.float32 else ("most_int", "least_int")
    text = str(args[0])
    for name, limit in zip(names, (low, high), strict=True):
        if limit is not None:
            limit = limit if isinstance(limit, str) else literal(limit, dtype)
            text = f"{name}({text}, {limit})"
    return text


def _nan_to_num(args: Sequence[str], kwargs: dict[str, Any], dtype: torch.dtype) -> str:
    largest = torch.finfo(torch.float32).max
    texts_given = [*args[1:], None, None, None][:3]
    names = ("nan", "posinf", "neginf")
    texts = []
    for text, name, default in zip(texts_given, names, (0.0, largest, -largest), strict=True):
        value = kwargs.get(name)
        texts.append(text or literal(default if value is None else value, dtype))
    return f"finite_or({args[0]}, {', '.join(texts)})"


def _sub(args: Sequence[str], kwargs: dict[str, Any], dtype: torch.dtype) -> str:
    if kwargs.get("alpha", 1) != 1:
        raise Unrecordable("sub with alpha")
    return f"({args[0]} - {args[1]})"


def _once(operation: str) -> bool:
    """Whether torch rounds ``operation`` once on this processor."""
    once = rounds_once(operation)
    if once is None:
        raise Unrecordable(f"torch's {operation}, which is rounded in an unknown way here")
    return once


def _addcmul(operation: str) -> Callable[..., str]:
    def text(args: Sequence[str], kwargs: dict[str, Any], dtype: torch.dtype) -> str:
        first = args[1]
        if kwargs.get("value", 1) != 1:
            first = f"({first} * {literal(kwargs['value'], dtype)})"
        if _once(operation):
            return f"fma_({first}, {args[2]}, {args[0]})"
        return f"({args[0]} + {first} * {args[2]})"

    return text


def _lerp(args: Sequence[str], kwargs: dict[str, Any], dtype: torch.dtype) -> str:
    return f"lerp_{'once' if _once('lerp') else 'twice'}({', '.join(args)})"


def _addcdiv(args: Sequence[str], kwargs: dict[str, Any], dtype: torch.dtype) -> str:
    first = args[1]
    if kwargs.get("value", 1) != 1:
        first = f"({first} * {literal(kwargs['value'], dtype)})"
    return f"({args[0]} + {first} / {args[2]})"


# functions of the arguments, converted to the dtype that torch computes in, keywords and that dtype
OPERATIONS: dict[str, Callable[..., str]] = {
    "add": _add,
    "sub": _sub,
    "rsub": _plain(lambda a, b: f"({b} - {a})"),
    "mul": lambda args, kwargs, dtype: (
        f"({args[0]} & {args[1]})" if dtype == torch.bool else f"({args[0]} * {args[1]})"
    ),
    "div": _infix("/"),
    "lt": _infix("<"),
    "le": _infix("<="),
    "gt": _infix(">"),
    "ge": _infix(">="),
    "eq": _infix("=="),
    "ne": _infix("!="),
    "bitwise_and": _infix("&"),
    "bitwise_or": _infix("|"),
    "bitwise_xor": _infix("^"),
    "logical_and": _infix("&"),
    "logical_or": _infix("|"),
    "__rshift__": _infix(">>"),
    "__irshift__": _infix(">>"),
    "__lshift__": _plain(lambda a, b: f"shl({a}, {b})"),
    "__ilshift__": _plain(lambda a, b: f"shl({a}, {b})"),
    "bitwise_not": lambda args, kwargs, dtype: (
        f"(!{args[0]})" if dtype == torch.bool else f"(~{args[0]})"
    ),
    "logical_not": _plain(lambda a: f"(!{a})"),
    "neg": _plain(lambda a: f"(-{a})"),
    "abs": _either("magnitude", "magnitude_int"),
    "sign": _plain(
        lambda a: f"(select_f({a} > 0.0f, 1.0f, 0.0f) - select_f({a} < 0.0f, 1.0f, 0.0f))"
    ),
    "sqrt": _plain(lambda a: f"sqrt_({a})"),
    "reciprocal": _plain(lambda a: f"(1.0f / {a})"),
    "round": _plain(lambda a: f"rint_({a})"),
    "floor": _plain(lambda a: f"floor_({a})"),
    "signbit": lambda args, kwargs, dtype: f"(as_int({args[0]}) < 0)",
    "minimum": _either("least", "least_int"),
    "maximum": _either("most", "most_int"),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "nan_to_num": _nan_to_num,
    "lerp": _lerp,
    "addcmul": _addcmul("addcmul"),
    # addcmul with a scalar: what the reference does by add with alpha
    "add_scaled": _addcmul("add"),
    "addcdiv": _addcdiv,
}
