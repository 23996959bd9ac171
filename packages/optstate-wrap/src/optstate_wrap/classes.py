"""``wrapped_class``: a class of wrapped optimizers, for trainers that make the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from optstate_codecs.arguments import arguments_of, unknown_argument
from optstate_codecs.typed import typed_texts
from optstate_wrap.delegate import Delegate
from optstate_wrap.policies import Policy
from optstate_wrap.wrapper import OptimizerWrapper

__all__ = ["wrapped_class"]


def wrapped_class(
    optimizer_class: type[Optimizer], policy: Policy | None = None, **options: Any
) -> type[Optimizer]:
    """A class whose call makes an optimizer and wraps it.

    Trainers that take a class, such as Hugging Face's with ``optimizer_cls_and_kwargs``, make the
    optimizer themselves, with their own param groups. Calling ``cls(params, **arguments)`` is
    ``wrap(optimizer_class(params, **arguments), policy, **options)``: the result is an
    ``OptimizerWrapper``, not an instance of ``cls``. Arguments that are text are read by
    ``optstate_codecs.typed_arguments``.

    Args:
        optimizer_class: any subclass of ``torch.optim.Optimizer`` whose first argument is its
            parameters.
        policy: the policy of ``OptimizerWrapper``; each optimizer gets a copy.
        **options: the other arguments of ``OptimizerWrapper``. ``store`` must be a name:
            ``store="host"`` keeps state in host memory.

    Returns:
        A subclass of ``optimizer_class``, named ``Wrapped`` and the name of that class.

    Raises:
        TypeError: ``optimizer_class`` is no class of optimizers or one of wrappers, or an option
            is unknown. Values of options are checked when an optimizer is made.

    Examples:
        >>> cls = wrapped_class(torch.optim.AdamW, WarmupPolicy(100), fused=True)
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(cls, {"lr": 2e-5}))
    """
    given: Any = optimizer_class
    if not (isinstance(given, type) and issubclass(given, Optimizer)) or issubclass(
        given, Delegate
    ):
        got = repr(given) if isinstance(given, type) else f"of type {type(given).__name__}"
        raise TypeError(
            f"optimizer_class: {got}, must be a subclass of torch.optim.Optimizer, not of "
            "wrapped ones"
        )
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r}: must be a Policy, got {type(policy).__name__}")
    known = [name for name in arguments_of(OptimizerWrapper) if name != "optimizer"]
    for name in options:
        if name not in known:
            raise unknown_argument(OptimizerWrapper, name, known)
    store = options.get("store")
    if store is not None and not isinstance(store, str):
        raise TypeError(
            f"store={store!r}: must be 'device', 'host' or None, since it is not shared"
        )

    def make(cls: type, params: Iterable[Any], *args: Any, **arguments: Any) -> OptimizerWrapper:
        made = optimizer_class(params, *args, **typed_texts(optimizer_class, arguments))
        return OptimizerWrapper(made, copy.deepcopy(policy), **options)

    name = f"Wrapped{optimizer_class.__name__}"
    doc = f"``{optimizer_class.__name__}``, wrapped, see ``wrapped_class``."
    return type(name, (optimizer_class,), {"__new__": make, "__module__": __name__, "__doc__": doc})
