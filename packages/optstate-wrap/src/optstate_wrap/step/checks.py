"""Checks parameters, gradients and state before a step, and names the ones it cannot step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.sharding import local_of
from optstate_wrap.probe import Findings, why_not
from optstate_wrap.state.param_chunks import ParamChunk
from optstate_wrap.state.record import Coded, OffloadedTensor
from optstate_wrap.state.store import Store

__all__ = ["ParamGrad", "check_params", "check_records", "check_state"]


#: the number of a parameter, the parameter and its gradient
ParamGrad = tuple[int, Tensor, Tensor | None]


def check_params(params: Iterable[ParamGrad], offloaded: bool = False) -> None:
    """Raise unless every parameter can be stepped with its gradient.

    Args:
        params: each parameter with its number and its gradient, if it has one.
        offloaded: whether gradients may be on other devices than their parameters.

    Raises:
        RuntimeError: a gradient has another shape or device than its parameter; elements of the
            parameter share memory; or it was made under ``torch.inference_mode()``.
    """
    inside = torch.is_inference_mode_enabled()
    for number, param, grad in params:
        if grad is None:
            continue
        if grad.shape != param.shape:
            raise RuntimeError(
                f"gradient of parameter {number}: shape {tuple(grad.shape)}, must be "
                f"{tuple(param.shape)} as the parameter's; was its data replaced?"
            )
        if not offloaded and grad.device != param.device:
            raise RuntimeError(
                f"gradient of parameter {number}: on {grad.device}, must be on {param.device} as "
                "the parameter"
            )
        if not inside and param.is_inference():
            raise RuntimeError(
                f"parameter {number}: is an inference tensor, which cannot be updated in place "
                "outside torch.inference_mode(); make it outside, or from a clone"
            )
        if not param.is_contiguous() and _shares_memory(param):
            raise RuntimeError(
                f"parameter {number}: several of its elements are one place in memory, as expand() "
                f"makes them (shape {tuple(param.shape)}, strides {param.stride()}); clone it"
            )


def _shares_memory(param: Tensor) -> bool:
    if param.layout is not torch.strided or not param.numel():
        return False
    return any(n > 1 and stride == 0 for n, stride in zip(param.shape, param.stride(), strict=True))


def check_records(
    inner: Optimizer, chunks: Iterable[ParamChunk], store: Store, findings: Findings
) -> None:
    """Raise unless the stored state of every parameter with a gradient fits the parameter."""
    for chunk in chunks:
        param = chunk.param
        if chunk.part or (grad := param.grad) is None:
            continue
        records = store.latest_records(param)
        if not records:
            continue
        given, shape = (chunk.number, param, grad), None
        if len(records) == 1:
            shape = param.shape
        elif (stored := store.layout(param).shape) != param.shape:
            raise _wrong_shape(chunk.number, "state", stored, param.shape)
        device = None if store.name == "host" else param.device
        check_state(inner, findings, given, records[0], shape, device)


def check_state(
    inner: Optimizer,
    findings: Findings,
    given: tuple[int, Tensor, Tensor],
    state: Mapping[str, Any],
    shape: tuple[int, ...] | None,
    device: torch.device | None,
) -> None:
    """Raise unless the state of a parameter fits it.

    Args:
        inner: the optimizer.
        findings: of a probe of the optimizer.
        given: the number of the parameter, the parameter and its gradient.
        state: of the parameter, decoded or as a record.
        shape: required of values with one number per element; None: any.
        device: required of the same values; None: any.

    Raises:
        RuntimeError: a value has another shape or device, or a dtype with which the optimizer
            cannot step the parameter.
    """
    dtype, elementwise = given[1].dtype, findings.elementwise
    on_cpu = device is not None and device.type == "cpu"
    for key, value in state.items():
        if type(value) is Tensor:
            # the usual case, which has to be fast
            if key not in elementwise or (
                value.dtype is dtype
                and (value.is_cpu if on_cpu else device is None or value.device == device)
                and (shape is None or value.shape == shape)
            ):
                continue
        elif not isinstance(value, (Coded, OffloadedTensor)) and key not in elementwise:
            continue
        _check_value(inner, findings, given, key, value, shape, device)


def _check_value(
    inner: Optimizer,
    findings: Findings,
    given: tuple[int, Tensor, Tensor],
    key: str,
    value: Any,
    shape: tuple[int, ...] | None,
    device: torch.device | None,
) -> None:
    number, param, grad = given
    expected = shape
    if isinstance(value, Coded):
        actual, where = value.shape, value.parts[0].device
        expected = tuple(local_of(param).shape)
    elif key not in findings.elementwise:
        return
    elif isinstance(value, OffloadedTensor):
        # the device that uses it has to fit, not the host that stores it
        value, where, device = value.tensor, value.device, param.device
        actual = tuple(value.shape)
    elif isinstance(value, Tensor):
        actual, where = tuple(value.shape), value.device
    else:
        return
    if shape is not None and expected is not None and actual != expected:
        raise _wrong_shape(number, key, actual, expected)
    if device is not None and where != device:
        raise RuntimeError(
            f"{key!r} of parameter {number}: on {where}, must be on {device} as the parameter; "
            "load its state again, or delete it"
        )
    if key not in findings.elementwise or value.dtype == (findings.keys[key] or param.dtype):
        return
    reason = why_not(inner, param.dtype, grad.dtype, value.dtype)
    if reason is not None:
        raise RuntimeError(
            f"{key!r} of parameter {number}: {value.dtype}, while the parameter is {param.dtype} "
            f"({type(inner).__name__}: {reason}); load its state again, or delete it"
        )


def _wrong_shape(number: int, key: str, shape: Any, expected: Any) -> RuntimeError:
    return RuntimeError(
        f"{key!r} of parameter {number}: shape {shape}, must be {tuple(expected)} as the "
        "parameter's; was its data replaced? Load its state again, or delete it"
    )
