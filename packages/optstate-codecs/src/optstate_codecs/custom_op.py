"""Operations of ``torch.library``, which a compiler calls and does not look into: the step is one.

``torch.compile`` would otherwise trace the host's side of a step: hyper-parameters would become
constants of the graph, and a new learning rate a new compilation. Through the operation they are
read when the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from optstate_codecs.optimizer import CodedOptimizer

__all__ = ["define", "new_handle", "step_as_operation", "untraced"]

# an operation takes tensors and numbers only, so an optimizer goes by a number
SCHEMA = "step(int handle, int[] places, Tensor(a!)[] params, Tensor[] grads) -> ()"
# where this torch has them: a compiler must not record one into a CUDA graph of its own, since the
# host has a part in each, and must hand tensors over laid out as they are
TAGS = ("cudagraph_unsafe", "needs_exact_strides")
_optimizers: WeakValueDictionary[int, CodedOptimizer] = WeakValueDictionary()
_handles = count()


def new_handle(optimizer: CodedOptimizer) -> int:
    """A number by which the operation finds ``optimizer`` as long as it lives."""
    handle = next(_handles)
    _optimizers[handle] = optimizer
    return handle


def step_as_operation(
    handle: int, places: Sequence[int], params: Sequence[Tensor], grads: Sequence[Tensor]
) -> None:
    """Step the optimizer; compilers take this into their graph as it is.

    Args:
        handle: of the optimizer.
        places: of the parameters that have gradients, counted over all groups.
        params: these parameters.
        grads: their gradients.
    """
    torch.ops.optstate.step(handle, places, params, grads)


def _run(handle: int, places: list[int], params: list[Tensor], grads: list[Tensor]) -> None:
    optimizer = _optimizers.get(handle)
    if optimizer is None:
        raise RuntimeError("optstate::step: its optimizer is gone; compile the step again")
    if optimizer.traced_groups is not optimizer.param_groups:
        raise RuntimeError(
            "optstate::step: optimizer.param_groups is another list than the compiled one; "
            "take a step outside torch.compile and compile again"
        )
    every = [param for group in optimizer.param_groups for param in group["params"]]
    own = [every[place] for place in places]
    # a compiler that removes mutation hands over copies and writes them back later
    copies = [
        (mine, given)
        for mine, given in zip(own, params, strict=True)
        if mine.data_ptr() != given.data_ptr()
    ]
    for mine, given in copies:
        mine.copy_(given)
    optimizer._step(dict(zip(places, grads, strict=True)))
    for mine, given in copies:
        given.copy_(mine)


def define(schema: str, run: Callable[..., None]) -> None:
    """Make an operation ``optstate::...`` that changes what its schema says, and returns nothing.

    Args:
        schema: its name, arguments and what it changes.
        run: what it does.
    """
    name = schema.partition("(")[0]
    tags = [getattr(torch.Tag, tag) for tag in TAGS if hasattr(torch.Tag, tag)]
    library: Any = _library
    library.define(schema, tags=tags)
    library.impl(name, untraced(torch.no_grad()(run)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"optstate::{name}", _pretend, lib=_library)


def untraced(run: Callable[..., None]) -> Callable[..., None]:
    """``run``, into which a compiler does not look where it has begun to trace the call.

    As where a graph breaks at an operation, and in hooks of a backward between two graphs.
    """
    disabled: list[Callable[..., None]] = []

    def call(*args: Any) -> None:
        if not torch.compiler.is_compiling():
            run(*args)
            return
        if not disabled:
            # not before: it loads the compiler
            disable: Any = torch.compiler.disable
            disabled.append(disable(run))
        disabled[0](*args)

    return call


def _pretend(*args: object, **kwargs: object) -> None:
    """An operation on tensors without data: it returns nothing."""


_library = torch.library.Library("optstate", "FRAGMENT")  # type: ignore[no-untyped-call]
define(SCHEMA, _run)
