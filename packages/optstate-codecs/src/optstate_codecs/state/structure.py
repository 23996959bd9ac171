"""The nesting of state dicts, checked before anything in them is read.

State dicts come from files, which anything may have written. What is nested in another way is
refused by name here, so that the code that reads state dicts need not ask for types again. Errors
that it raises nevertheless, such as a tensor operation that cannot take a dtype, become the
documented ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.state.components import check_dense

__all__ = ["check_structure", "check_values", "malformed"]

# of torch's optimizers; a rule checks its own
FLAGS = ("capturable", "differentiable", "foreach", "fused")


def check_structure(state_dict: Any, groups: Sequence[Mapping[str, Any]] = ()) -> None:
    """Raise unless a state dict is nested as ``torch.optim``'s, and names each parameter once.

    Args:
        state_dict: what is checked.
        groups: of the optimizer that loads it. A parameter may be named twice where its group has
            it twice, of which torch warns.

    Raises:
        KeyError: ``state`` or ``param_groups`` is missing.
        TypeError: something is of another type; the message names it.
        ValueError: a parameter is in the groups twice.
    """
    for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if key not in state_dict:
            raise KeyError(f"state_dict: missing key {key!r}")
        _check(f"state_dict[{key!r}]", state_dict[key], kind)
    seen: dict[Hashable, tuple[int, int]] = {}
    for index, group in enumerate(state_dict["param_groups"]):
        where = f"state_dict['param_groups'][{index}]"
        _check(where, group, Mapping)
        for key, value in _tensors_of(group):
            check_dense(f"{where}[{key!r}]", value)
        numbers = group.get("params", ())
        _check(f"{where}['params']", numbers, (list, tuple))
        params = groups[index]["params"] if index < len(groups) else ()
        for place, number in enumerate(numbers):
            _check(f"{where}['params']: item", number, (int, str))
            first_group, first = seen.setdefault(number, (index, place))
            same = first_group == index and place < len(params) and params[first] is params[place]
            if (first_group, first) != (index, place) and not same:
                raise ValueError(f"{where}['params']: parameter {number!r} is there twice")
            if (state := state_dict["state"].get(number)) is not None:
                _check(f"state_dict['state'][{number!r}]", state, Mapping)
        for key in ("formats", "orders"):
            if (table := group.get(key)) is not None:
                _check(f"{where}[{key!r}]", table, Mapping)
                for name, value in table.items():
                    kinds = (str, str) if key == "formats" else ((int, str), (list, tuple))
                    _check(f"{where}[{key!r}]: key", name, kinds[0])
                    _check(f"{where}[{key!r}][{name!r}]", value, kinds[1])


def check_values(saved: Mapping[str, Any], params: Sequence[Tensor]) -> None:
    """Raise unless a saved group's tensors have values, and its flags are no tensors.

    Raises:
        ValueError: a tensor is on meta, and the parameters are not.
        TypeError: a flag is of another type.
    """
    for key, value in _tensors_of(saved):
        if value.is_meta and not any(param.is_meta for param in params):
            raise ValueError(f"{key}: is on meta, without a value")
    for key in FLAGS:
        if not isinstance(flag := saved.get(key), (bool, int, type(None))):
            raise TypeError(f"{key}={flag!r:.80}: must be True, False or None")


def _tensors_of(group: Mapping[Any, Any]) -> Iterator[tuple[Any, Tensor]]:
    """The tensors among a group's values, and in lists and tuples such as betas, by their keys."""
    for key, value in group.items():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor):
                yield key, item


_NAMES = {Mapping: "dict", list: "list", tuple: "tuple", int: "int", str: "str"}


def _check(where: str, value: Any, kind: Any) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds):
        allowed = " or ".join(_NAMES[each] for each in kinds)
        raise TypeError(f"{where}={value!r:.80}: must be a {allowed}, got {type(value).__name__}")


@contextmanager
def malformed(where: str) -> Iterator[None]:
    """Raise errors of malformed input as ``ValueError``, with ``where`` before their message.

    Wrap only code that changes nothing. Errors that say what is wrong already, and those of the
    machine, are raised as they are.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deep") from error
    except (RuntimeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{where}: malformed: {error}") from error
