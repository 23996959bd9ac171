"""Components of a parameter's state: their keys, and checks of tensors given for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.formats import Component, Format
from optstate_codecs.state.layout import Declaration

__all__ = ["check_component", "check_dense", "check_scales", "check_tensor", "components_of"]


def components_of(stored: Mapping[str, Declaration]) -> dict[str, Component]:
    """The components of all moments and of the parameter write, by state key, in order."""
    return {c.key(name): c for name, declared in stored.items() for c in declared.components}


def check_dense(name: str, value: Tensor) -> None:
    """Raise unless a tensor has one number at one place for each element.

    Raises:
        TypeError: it is sparse, nested or quantized.
    """
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        raise TypeError(f"{name}: is {kind}, must be dense")


def check_tensor(name: str, value: Any, shape: Sequence[int], advice: str = "") -> Tensor:
    """Raise unless ``value`` is a dense tensor of that shape, and return it.

    Raises:
        TypeError: it is not a tensor, or not a dense one.
        RuntimeError: it has another shape; the message ends with ``advice``.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}={value!r:.80}: must be a tensor, got {type(value).__name__}")
    check_dense(name, value)
    if tuple(value.shape) != tuple(shape):
        raise RuntimeError(
            f"{name}: size mismatch: shape {tuple(value.shape)}, must be {tuple(shape)}{advice}"
        )
    return value


def check_component(
    name: str, value: Any, component: Component, param: Tensor, any_float: bool, advice: str = ""
) -> Tensor:
    """Raise unless ``value`` has the shape and dtype of a component, and return it.

    Raises:
        TypeError: it is not a tensor, or has another dtype: one that is not floating point, if
            ``any_float``.
        RuntimeError: it has another shape; the message ends with ``advice``.
    """
    tensor = check_tensor(name, value, component.shape(param.shape), advice)
    if tensor.dtype != component.dtype and not (any_float and tensor.is_floating_point()):
        raise TypeError(f"{name}: dtype {tensor.dtype}, must be {component.dtype}")
    return tensor


def check_scales(name: str, part: Tensor, component: Component, format: Format) -> None:
    """Raise if a component has scales that the format never stores.

    Raises:
        ValueError: a scale is not finite; or it is negative, which means nothing in this format.
    """
    if not component.suffix.startswith("scale"):
        return
    if not part.isfinite().all():
        raise ValueError(f"{name}: must be finite")
    if not format.marks and (part < 0).any():
        raise ValueError(f"{name}: must be at least 0 in format {format.name}")
