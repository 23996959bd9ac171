"""The contract of every reader of checkpoints, checked for one input.

An input loads, and then a step works, or it is refused: with one of the documented exceptions,
whose message says something, with the optimizer bitwise as it was and no file changed.
"""

from __future__ import annotations

import hashlib
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs.errors import StepError

DOCUMENTED = (ValueError, TypeError, KeyError, OSError)


class Violation(AssertionError):
    """An input for which a reader breaks its contract."""


def gradients(params: list[Parameter], seed: int = 5) -> None:
    """Give each parameter a gradient, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        noise = torch.randn(param.shape, generator=generator)
        param.grad = torch.empty_like(param).copy_(noise)


def fingerprint(optimizer: Any) -> list[Any]:
    """Parameters, state and groups, so that two of them are equal only if all bits are."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        found.append({k: repr(v) for k, v in group.items() if k != "params"})
        for param in group["params"]:
            found.append(bits(param))
            state = optimizer.state.get(param, {})
            found.append({key: bits(value) for key, value in state.items()})
    return found


def bits(value: Any) -> Any:
    """The bytes of a tensor in its order in memory, or the text of anything else."""
    if not isinstance(value, Tensor):
        return repr(value)
    dense = value.detach().contiguous().reshape(-1)
    raw = dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""
    return value.dtype, tuple(value.shape), raw


def files(folder: Path) -> dict[str, str]:
    """The content of all files in a folder, hashed."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def refused(load: Callable[[], Any], optimizer: Any, folder: Path | None = None) -> bool:
    """Whether ``load`` refuses its input.

    Raises:
        Violation: it raises another exception, or changes something before it refuses.
    """
    before = fingerprint(optimizer)
    there = files(folder) if folder else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()
    except DOCUMENTED as error:
        text = str(error)
        if len(text) < 10:
            raise Violation(f"{type(error).__name__} says only {text!r}") from error
        if fingerprint(optimizer) != before:
            raise Violation(f"changed before {type(error).__name__}: {text:.200}") from error
        if folder and files(folder) != there:
            raise Violation(f"a file changed before {type(error).__name__}: {text}") from error
        return True
    except MemoryError:
        raise
    except Exception as error:
        raise Violation(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from error
    return False


def steps(params: list[Parameter], optimizer: Any, whole: bool = True) -> None:
    """Take a step, which must work.

    Args:
        params: of the optimizer.
        optimizer: has loaded a state.
        whole: whether the step must succeed; otherwise it may raise ``StepError``, which names the
            parameters that it has not stepped.

    Raises:
        Violation: the step raises.
    """
    gradients(params)
    try:
        optimizer.step()
        optimizer.state_dict()
    except Exception as error:
        if isinstance(error, StepError) and not whole:
            return
        raise Violation(
            f"loaded, and then {type(error).__name__}: {error}\n{traceback.format_exc()}"
        ) from error


def check_untouched(
    params: list[Parameter], expected: Mapping[int, Any], touched: set[Any]
) -> None:
    """Raise unless each parameter whose state was not edited has stepped as it would have.

    Raises:
        Violation: one has not.
    """
    for number, param in enumerate(params):
        if number not in touched and bits(param) != expected[number]:
            raise Violation(f"parameter {number} depends on the state of {sorted(touched)}")
