"""Reads a model from the text on the command line.

The text is the name of a model, a count of parameters, a file or folder of weights, or
``module:callable``, which makes the model.
"""

import importlib
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optstate.models.families import NAMED, Shape, named_shapes
from optstate.models.model import Model
from optstate.models.weights import read_weights

FORMS = "a name, a count such as 8B, a file or folder of weights, or module:callable"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
SIDE = 4096
ASSUMED = (
    "a count has no shapes: matrices of 4096 x 4096 are assumed; name a model or a file for the"
    " scales and the largest gradient of its own shapes"
)


def read_model(
    text: str, dtype: torch.dtype | None = None, key: str | None = None, layers: int | None = None
) -> Model:
    """The parameters that a text stands for; nothing is allocated.

    Args:
        text: one of the forms above.
        dtype: of all parameters; None: that of the file or factory, else bfloat16.
        key: the entry of a torch checkpoint that holds the weights, with dots between levels.
        layers: replaces the number of blocks of a named model.

    Raises:
        ValueError: the text has none of these forms, or what it names cannot be read.

    Example:
        >>> read_model("8B").parameters
        8000000000
    """
    name = text.lower()
    if layers is not None and name not in NAMED:
        raise ValueError(f"layers={layers}: only for a named model, not for {text!r}")
    if key is not None and not Path(text).exists():
        raise ValueError(f"key={key!r}: only for a torch checkpoint, not for {text!r}")
    if name in NAMED:
        source = name if layers is None else f"{name} with {layers} layers"
        return Model.of_shapes(source, named_shapes(name, layers), dtype or torch.bfloat16)
    count = parameter_count(text)
    if count is not None:
        shapes = shapes_of_count(count)
        return Model.of_shapes(text, shapes, dtype or torch.bfloat16, (ASSUMED,))
    if Path(text).exists():
        model = read_weights(Path(text), key)
    elif re.fullmatch(r"[\w.]+:[\w.]+", text):
        model = model_of_factory(text)
    else:
        close = get_close_matches(name, NAMED, n=1)
        meant = f"; did you mean {close[0]}?" if close else f"; names are {', '.join(NAMED)}"
        raise ValueError(f"{text!r}: no model; must be {FORMS}{meant}")
    return model if dtype is None else model.in_dtype(dtype)


def parameter_count(text: str) -> int | None:
    """The number that a text such as ``8B``, ``7e9`` or ``124_439_808`` is; None if it is none.

    Raises:
        ValueError: it is a number below 1.
    """
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?(?:e\d+)?)\s*([kmbt]?)", text.lower())
    if found is None:
        return None
    number, unit = found.groups()
    count = round(float(re.sub("[_,]", "", number)) * UNITS[unit])
    if count < 1:
        raise ValueError(f"{text!r}: must be at least one parameter")
    return count


def shapes_of_count(count: int) -> list[Shape]:
    """Square matrices with this many elements in all, and a vector of the rest."""
    side = min(SIDE, isqrt(count))
    matrices, rest = divmod(count, side * side)
    shapes: list[Shape] = [(side, side)] * matrices
    return [*shapes, (rest,)] if rest else shapes


def model_of_factory(text: str) -> Model:
    """The model that a function makes, called without arguments on the meta device.

    Args:
        text: ``module:callable``; the module may lie in the working directory. The callable
            returns a module, a state dict, or parameters.

    Raises:
        ValueError: it cannot be imported or called, or returns something else.
    """
    module_name, _, path = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made: Any = importlib.import_module(module_name)
        for part in path.split("."):
            made = getattr(made, part)
        with torch.device("meta"):
            made = made()
    except Exception as error:  # whatever user code raises is an error of this argument
        raise ValueError(f"{text!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    tensors = list(named_tensors(made))
    if not tensors:
        raise ValueError(
            f"{text!r}: returned {type(made).__name__}; must be a torch.nn.Module, a dict of"
            " tensors, or parameters"
        )
    return Model.of_tensors(text, tensors)


def named_tensors(made: Any) -> Iterable[tuple[str, Tensor]]:
    """Names and tensors of a module, a state dict or an iterable of tensors."""
    if isinstance(made, nn.Module):
        return made.named_parameters()
    if isinstance(made, dict):
        return [(str(name), value) for name, value in made.items() if isinstance(value, Tensor)]
    try:
        tensors = list(made)
    except TypeError:
        return []
    return [(str(i), value) for i, value in enumerate(tensors) if isinstance(value, Tensor)]
