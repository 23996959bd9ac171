"""``offloaded_class``: a class of offloaded optimizers, for trainers that make the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from optstate_codecs.arguments import unknown_argument
from optstate_codecs.offloading.offload import offload
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.typed import typed_texts

__all__ = ["offloaded_class"]


def offloaded_class(
    optimizer_class: type[CodedOptimizer], store: str = "host", **options: Any
) -> type[CodedOptimizer]:
    """A class whose call makes an optimizer and offloads its state.

    Trainers that take a class, such as Hugging Face's with ``optimizer_cls_and_kwargs``, make the
    optimizer themselves, with their own param groups. Calling ``cls(params, **arguments)`` is
    ``offload(optimizer_class(params, **arguments), store, **options)``: the result is an instance
    of ``optimizer_class``, not of ``cls``. Arguments that are text are read by
    ``typed_arguments``.

    Args:
        optimizer_class: a class of the family.
        store: "host" or "disk", as in ``offload``.
        **options: other arguments of ``offload``: ``path``, ``resume``, ``sync``, ``chunk_bytes``,
            ``resident_bytes``. A file belongs to one optimizer, so with a ``path`` call the class
            once.

    Returns:
        A subclass of ``optimizer_class``, named ``Offloaded`` and the name of that class.

    Raises:
        TypeError: ``optimizer_class`` is not a class of the family, or an option is unknown. Values
            of options are checked when an optimizer is made.

    Examples:
        >>> cls = offloaded_class(AdamW8bit, chunk_bytes=2**24)
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(cls, {"lr": 2e-5}))
    """
    given: Any = optimizer_class
    if not (isinstance(given, type) and issubclass(given, CodedOptimizer)):
        got = repr(given) if isinstance(given, type) else f"of type {type(given).__name__}"
        raise TypeError(
            f"optimizer_class: {got}, must be a class of optimizers of the family; "
            "optstate_wrap.wrapped_class takes any other"
        )
    known = [name for name in inspect.signature(offload).parameters if name != "optimizer"]
    for name in options:
        if name not in known:
            raise unknown_argument(offload, name, known)

    def make(cls: type, params: Iterable[Any], *args: Any, **arguments: Any) -> CodedOptimizer:
        made = optimizer_class(params, *args, **typed_texts(optimizer_class, arguments))
        return offload(made, store, **options)

    name = f"Offloaded{optimizer_class.__name__}"
    doc = f"``{optimizer_class.__name__}`` with its state offloaded, see ``offloaded_class``."
    return type(name, (optimizer_class,), {"__new__": make, "__module__": __name__, "__doc__": doc})
