"""Steps requests with compiled kernels: the fast path on a CPU.

A kernel is built once for each set of formats, rule, dtypes and write (see ``engine.cpu``).
Hyper-parameters, step counts and sizes are its arguments, so that they cause no other build. A step
takes no memory but one block of decoded values on each thread's stack.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from optstate_codecs.counts import counted, taken
from optstate_codecs.engine import eager
from optstate_codecs.engine.cpu.build import CannotBuild
from optstate_codecs.engine.cpu.kernels import CompiledKernel, KernelSpec, compiled_kernel
from optstate_codecs.engine.request import ParamStep, StepRequest
from optstate_codecs.rounding import stream_key

__all__ = ["step", "try_step"]

DTYPES = (torch.float32, torch.bfloat16)

_warned: set[str] = set()


def try_step(request: StepRequest) -> bool:
    """``step`` and return True; without a working compiler, warn once and return False."""
    if _warned:
        return False
    try:
        step(request)
    except CannotBuild as error:
        _warned.add(str(error))
        warnings.warn(
            f"no working C++ compiler ({error}), so optimizers on the CPU step several times "
            "slower; install g++ or clang++ or set CXX, or choose backend='eager'",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def step(request: StepRequest) -> None:
    """Step every parameter that a kernel exists for, and the others with the reference.

    Raises:
        CannotBuild: there is no working compiler; nothing has changed.
    """
    variants = [request.rule.variant(hyper) for hyper in request.hypers]
    members: dict[CompiledKernel, list[tuple[int, _Prepared]]] = {}
    fallback = []
    pairs = zip(request.param_steps, request.grads, strict=True)
    for position, (param_step, grad) in enumerate(pairs):
        prepared, variant = _prepared.get(param_step), variants[param_step.group]
        if request.grad_means is not None and request.grad_means.starts[position] >= 0:
            fallback.append(position)
            continue
        if prepared is None or not prepared.is_valid(grad, variant):
            prepared = _prepared[param_step] = _prepare(request, param_step, grad, variant)
        if prepared.kernel is None:
            fallback.append(position)
        else:
            members.setdefault(prepared.kernel, []).append((position, prepared))
    if request.found_inf is not None and bool(request.found_inf):
        return
    for kernel, stepped in members.items():
        _run(request, kernel, stepped)
    if fallback:
        eager.step(request.part(fallback))


@dataclass(eq=False)
class _Prepared:
    """The kernel of a parameter, and those of its arguments that stay the same between steps.

    Attributes:
        kernel: None where the reference steps the parameter.
        variant, grad: the rule's variant, and the gradient's dtype and strides, chosen for.
        addresses: of the parameter and of the components in ``kernel.keys``.
        keys: of the random numbers.
    """

    kernel: CompiledKernel | None
    variant: Hashable
    grad: tuple[torch.dtype, tuple[int, ...]]
    addresses: list[int]
    keys: list[int]

    def is_valid(self, grad: Tensor, variant: Hashable) -> bool:
        """Whether it fits this gradient, if parameter and state have not moved."""
        return self.variant == variant and self.grad == (grad.dtype, grad.stride())


_prepared: WeakKeyDictionary[ParamStep, _Prepared] = WeakKeyDictionary()


def _prepare(
    request: StepRequest, param_step: ParamStep, grad: Tensor, variant: Hashable
) -> _Prepared:
    kernel = None
    if _fits(param_step, grad):
        stored = param_step.bound
        formats = tuple(stored[moment.name] for moment in param_step.moments)
        scalars = len(request.rule.scalars(request.hypers[param_step.group], 1.0))
        stored_as = param_step.moments, formats, param_step.write, param_step.plain
        spec = KernelSpec(request.rule, variant, *stored_as, grad.dtype, scalars)
        kernel = compiled_kernel(spec)
    addresses, keys = [param_step.param.data_ptr()], list[int]()
    if kernel is not None:
        addresses += [param_step.state[key].data_ptr() for key in kernel.keys]
        keys = [
            k for s in kernel.streams for k in stream_key(param_step.seed, param_step.key, s // 2)
        ]
    return _Prepared(kernel, variant, (grad.dtype, grad.stride()), addresses, keys)


def _fits(param_step: ParamStep, grad: Tensor) -> bool:
    """Whether a kernel can take the layouts and dtypes of a parameter, its state and gradient."""
    param = param_step.param
    return (
        param_step.state["step"].device.type == "cpu"
        and param.dtype in DTYPES
        and grad.dtype in DTYPES
        and not any(format.whole for format in param_step.bound.values())
        and param_step.in_one_order(grad)
    )


def _run(
    request: StepRequest, kernel: CompiledKernel, members: list[tuple[int, _Prepared]]
) -> None:
    """Step the parameters of one kernel in one call."""
    param_steps = [request.param_steps[position] for position, _ in members]
    counts = counted(
        [param_step.state["step"] for param_step in param_steps], request.draw is not None
    )
    request.counted += param_steps
    factor = 1.0 if request.factor is None else float(request.factor)
    table: list[int] = []
    scalars: list[Any] = []
    keys: list[int] = []
    folded: dict[tuple[int, float], list[Any]] = {}
    blocks = 0
    for param_step, count, (position, prepared) in zip(param_steps, counts, members, strict=True):
        numel = param_step.param.numel()
        param, *parts = prepared.addresses
        draw = taken(count) if request.draw is None else request.draw
        table += [numel, blocks, draw, param_step.offset]
        table += [param, request.grads[position].data_ptr(), *parts]
        key = (param_step.group, count)
        if key not in folded:
            folded[key] = [*request.rule.scalars(request.hypers[param_step.group], count), factor]
        scalars += folded[key]
        keys += prepared.keys
        blocks += -(-numel // kernel.block_size)
    tables = (
        torch.tensor(table, dtype=torch.int64, device="cpu"),
        torch.tensor(scalars, dtype=torch.float32, device="cpu"),
        torch.tensor(keys, dtype=torch.int64, device="cpu").to(torch.int32),
    )
    addresses = [tensor.data_ptr() for tensor in tables]
    kernel.run(len(param_steps), blocks, *addresses, torch.get_num_threads())
    request.done += param_steps
