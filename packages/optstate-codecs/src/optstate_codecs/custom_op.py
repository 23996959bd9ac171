"""Custom operators of ``torch.library``, which compilers call without tracing; a step is one.

``torch.compile`` would otherwise trace the host's side of a step: hyper-parameters would become
constants of the graph, and a new learning rate would compile it again. The operator reads them when
the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from optstate_codecs.sharding import is_distributed

__all__ = ["call_step_op", "define", "register_step", "untraced"]

# an operator takes tensors and numbers only, so a handle stands for the optimizer
SCHEMA = "step(int handle, int[] indices, Tensor(a!)[] params, Tensor[] grads) -> ()"
# set where this torch has them: a compiler must not record the operator into a CUDA graph of its
# own, since part of it runs on the host, and must pass tensors with the strides they have
TAGS = ("cudagraph_unsafe", "needs_exact_strides")

ParamsMethod = Callable[[], Sequence[Tensor]]
StepMethod = Callable[[Mapping[int, Tensor]], None]
_steps: dict[int, tuple[WeakMethod[ParamsMethod], WeakMethod[StepMethod]]] = {}
_handles = count()


def register_step(params: ParamsMethod, step: StepMethod) -> int:
    """Make a handle by which the operator steps an optimizer for as long as that lives.

    Args:
        params: a bound method that returns all parameters of the optimizer.
        step: a bound method that takes a step with the given gradients, by parameter index.
    """
    handle = next(_handles)
    # bound now: when the interpreter exits, the module's names may be gone before an optimizer is
    pop = _steps.pop
    _steps[handle] = WeakMethod(params, lambda _: pop(handle, None)), WeakMethod(step)
    return handle


def traced_params(
    traced: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> list[Tensor]:
    """All parameters of ``groups``; raises if that is not the list that was ``traced``."""
    if traced is not groups:
        raise RuntimeError(
            "optstate::step: optimizer.param_groups is another list than the compiled one; "
            "take a step outside torch.compile and compile again"
        )
    return [param for group in groups for param in group["params"]]


def call_step_op(handle: int, groups: Sequence[Mapping[str, Any]]) -> None:
    """Step the parameters that have gradients; compilers put one operator call into their graph.

    Args:
        handle: of the optimizer, from ``register_step``.
        groups: its param groups.
    """
    indices, params, grads = [], [], []
    index = 0
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                indices.append(index)
                params.append(param)
                grads.append(param.grad)
            index += 1
    if any(map(is_distributed, params)):
        # no sharding strategy can be registered for an operator that mutates lists of tensors
        _step_outside(handle, indices, grads)
    elif indices:
        torch.ops.optstate.step(handle, indices, params, grads)


def _registered(handle: int) -> tuple[ParamsMethod, StepMethod]:
    """The methods of the optimizer of a handle; raises if it is gone."""
    registered = _steps.get(handle)
    params = registered and registered[0]()
    step = registered and registered[1]()
    if not params or not step:
        raise RuntimeError("optstate::step: its optimizer is gone; compile the step again")
    return params, step


def _run(handle: int, indices: list[int], params: list[Tensor], grads: list[Tensor]) -> None:
    all_params, step = _registered(handle)
    every = all_params()
    # a compiler that removes mutation passes copies and writes them back later
    copies = [
        (every[index], given)
        for index, given in zip(indices, params, strict=True)
        if every[index].data_ptr() != given.data_ptr()
    ]
    for own, given in copies:
        own.copy_(given)
    step(dict(zip(indices, grads, strict=True)))
    for own, given in copies:
        given.copy_(own)


def _step_sharded(handle: int, indices: list[int], grads: list[Tensor]) -> None:
    _, step = _registered(handle)
    step(dict(zip(indices, grads, strict=True)))


def define(schema: str, run: Callable[..., None]) -> None:
    """Define the operator ``optstate::...``, which mutates its arguments and returns nothing.

    Args:
        schema: its name, its arguments and which of them it mutates.
        run: its implementation.
    """
    name = schema.partition("(")[0]
    tags = [getattr(torch.Tag, tag) for tag in TAGS if hasattr(torch.Tag, tag)]
    library: Any = _library
    library.define(schema, tags=tags)
    library.impl(name, untraced(torch.no_grad()(run)), "CompositeExplicitAutograd")
    # on tensors without data it does nothing
    torch.library.register_fake(f"optstate::{name}", lambda *_, **__: None, lib=_library)


def untraced(run: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``run`` so that a compiler does not trace into it.

    A compiler traces the call where a graph breaks at an operator, and in hooks of a backward
    between two graphs.
    """
    disabled: list[Callable[..., None]] = []

    def call(*args: Any) -> None:
        if not torch.compiler.is_compiling():
            run(*args)
            return
        if not disabled:
            # not before: ``disable`` loads the compiler
            disable: Any = torch.compiler.disable
            disabled.append(disable(run))
        disabled[0](*args)

    return call


# DTensors are stepped between two graphs
_step_outside = untraced(_step_sharded)
_library = torch.library.Library("optstate", "FRAGMENT")  # type: ignore[no-untyped-call]
define(SCHEMA, _run)
