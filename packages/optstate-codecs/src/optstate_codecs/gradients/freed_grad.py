"""The placeholder in ``param.grad`` for a gradient that was stepped and freed in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from optstate_codecs.gradients.release_checks import scaler_error

__all__ = ["FreedGradient", "has_gradient", "remove_before_backward", "remove_freed"]

aten: Any = torch.ops.aten
# with these, autograd accumulates another gradient
ADDITIONS = (aten.add_.Tensor, aten.add.Tensor)


class FreedGradient(Tensor):
    """A gradient's shape, dtype and device without its memory; operations on it raise.

    If ``param.grad`` were None instead, ``torch.nn.utils.clip_grad_norm_``, a ``GradScaler`` or a
    logger between backward and ``step()`` would silently do nothing. ``zero_grad`` works, with
    either ``set_to_none``.

    Args:
        grad: the gradient.
        advice: the alternative to suggest in errors.
        accumulated: called with this placeholder when a backward is about to add to it.
    """

    _advice: str
    _accumulated: Callable[[FreedGradient], None]

    @staticmethod
    def __new__(
        cls, grad: Tensor, advice: str, accumulated: Callable[[FreedGradient], None]
    ) -> FreedGradient:
        make: Any = Tensor._make_wrapper_subclass
        freed: FreedGradient = make(
            cls,
            grad.shape,
            strides=grad.stride(),
            dtype=grad.dtype,
            device=grad.device,
            storage_size=0,
        )
        # for code that reads the memory directly, without an operation
        torch._C._set_throw_on_mutable_data_ptr(freed)
        freed._advice, freed._accumulated = advice, accumulated
        return freed

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """0, whatever the shape."""
        return 0

    def matches(self, grad: Tensor) -> bool:
        """Whether it has the dtype, shape, device and strides of ``grad``."""
        return (
            self.dtype is grad.dtype
            and self.shape == grad.shape
            and self.device == grad.device
            and self.stride() == grad.stride()
        )

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is aten.zero_.default:
            return args[0]
        if func is aten._foreach_zero_.default:
            if others := [grad for grad in args[0] if not isinstance(grad, FreedGradient)]:
                torch._foreach_zero_(others)
            return None
        if func in ADDITIONS and torch._C._current_graph_task_id() >= 0:
            args[0]._accumulated(args[0])
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("_amp_"):
            raise scaler_error()
        raise _error(name, (*args, *(kwargs or {}).values()))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FreedGradient(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> FreedGradient:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _error("pickle", [self])


def _error(name: str, values: Iterable[Any]) -> RuntimeError:
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    advice = next(x._advice for items in lists for x in items if isinstance(x, FreedGradient))
    return RuntimeError(
        f"GradientRelease: {name} of a gradient that was stepped and freed during backward; "
        f"{advice}"
    )


def has_gradient(param: Tensor) -> bool:
    """Whether a parameter has a gradient that has not been freed."""
    grad = param.grad
    return grad is not None and type(grad) is not FreedGradient


def remove_freed(param: Tensor) -> None:
    """Set ``param.grad`` to None if the gradient was freed."""
    if type(param.grad) is FreedGradient:
        param.grad = None


def remove_before_backward(param: ref[Tensor], grad: Tensor) -> None:
    """A hook on a parameter's gradient: autograd then finds no placeholder to add to."""
    alive = param()
    if alive is not None:
        remove_freed(alive)
