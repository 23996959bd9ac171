"""Finds the optimizer class of a name on the command line, and checks that it can be used."""

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module

import torch

from optstate.names import CHOICES, SHORT_NAMES
from optstate.siblings import EXTRA_OF, require

HINT = f"use one of {CHOICES}, or module.Class"


def full_name(name: str) -> str:
    """The dotted name of a short name, such as ``lowbit_adam.AdamW8bit``; others unchanged."""
    return SHORT_NAMES.get(name.lower(), name)


def in_order(baseline: str, others: Iterable[str]) -> list[str]:
    """Full names to run: the baseline, then the others, each once."""
    return list(dict.fromkeys([full_name(baseline), *map(full_name, others)]))


def resolve(name: str) -> type[torch.optim.Optimizer]:
    """Finds an optimizer class.

    Args:
        name: A key of `SHORT_NAMES` in any case, or the dotted path of a class.

    Raises:
        ValueError: There is no such class; the message lists the names.
        MissingExtra: The class is in a package of the family that is not installed.
    """
    module_name, _, class_name = full_name(name).rpartition(".")
    if not module_name:
        raise ValueError(f"{name!r}: no such optimizer; {HINT}")
    load = require if module_name.partition(".")[0] in EXTRA_OF else import_module
    try:
        module = load(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{name!r}: cannot import {module_name!r}; {HINT}") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"{name!r}: not a torch.optim.Optimizer class; {HINT}")
    return found


def with_arguments(
    optimizer_class: type[torch.optim.Optimizer], text: str
) -> Callable[..., torch.optim.Optimizer]:
    """The class with the arguments in a text ``name=value, ...``; the class itself without any.

    Raises:
        ValueError: The class does not take an argument, or a value has the wrong type.
    """
    try:
        arguments = require("optstate_codecs").typed_arguments(optimizer_class, text)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if "lr" in arguments:
        raise ValueError("lr: must be given as --lr, the same for all")
    return partial(optimizer_class, **arguments) if arguments else optimizer_class


def parse(text: str) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer that a text ``Name`` or ``Name(argument=value, ...)`` stands for.

    Args:
        text: the name as `resolve` takes it, and arguments as `with_arguments` does.

    Returns:
        A callable that takes parameters and ``lr``.

    Raises:
        ValueError: The class, an argument or a value is not allowed.
        MissingExtra: The class is in a package of the family that is not installed.

    Example:
        >>> parse("AdamW8bit(block_size=256)")(model.parameters(), lr=1e-3)
    """
    name, bracket, arguments = text.strip().partition("(")
    if bracket and not arguments.endswith(")"):
        raise ValueError(f"{text!r}: must be Name or Name(argument=value, ...)")
    return with_arguments(resolve(name), arguments[:-1])


def check_usable(
    name: str, optimizer_class: Callable[..., torch.optim.Optimizer], lr: float
) -> None:
    """Takes one step on one number, so that an unusable optimizer fails before training.

    Raises:
        ValueError: The optimizer needs arguments besides ``lr``, needs a closure, or rejects dense
            gradients.
    """
    number = torch.nn.Parameter(torch.ones(1, dtype=torch.float32, device="cpu"))
    number.grad = torch.ones_like(number)
    try:
        optimizer_class([number], lr=lr).step()
    except (TypeError, ValueError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
        raise ValueError(
            f"{name!r}: cannot be used as Class(params, lr={lr}): {problem}"
        ) from error
