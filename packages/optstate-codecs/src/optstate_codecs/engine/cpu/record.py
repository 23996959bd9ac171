"""Traces the torch operations of a function by running it once under a dispatch mode.

Every operation that depends on an input is recorded. Tensors computed from constants alone enter
the record as constants, with their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optstate_codecs.exact import recorded

__all__ = ["Call", "Node", "Record", "Unrecordable", "record"]


class Unrecordable(Exception):
    """The function cannot be compiled: it is no fixed sequence of supported operations."""


@dataclass(eq=False)
class Node:
    """A tensor in the record: an input, a constant or a result.

    Attributes:
        name: of an input, else "".
        numel, dtype: as recorded.
        value: of a constant, else None.
    """

    name: str
    numel: int
    dtype: torch.dtype
    value: Tensor | None = None


@dataclass(eq=False)
class Call:
    """One operation: its name (``add``, ``add_``), overload, arguments and results."""

    name: str
    overload: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Node]


@dataclass(eq=False)
class Record:
    """The operations of one run of a function.

    Attributes:
        inputs: by name.
        calls: in order.
        assumptions: flags that the function asked about and was told are all set.
    """

    inputs: dict[str, Node]
    calls: list[Call] = field(default_factory=list)
    assumptions: list[Node] = field(default_factory=list)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, inputs: Mapping[str, Tensor], assume: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._assume = assume
        # tensors are kept alive, so that no new one takes the id of an old one
        self._nodes: dict[int, tuple[Tensor, Node]] = {}
        self._all: dict[Node, Node] = {}
        for name, tensor in inputs.items():
            self._note(tensor, Node(name, tensor.numel(), tensor.dtype))
        self.record = Record({node.name: node for _, node in self._nodes.values()})

    def _note(self, tensor: Tensor, node: Node) -> Node:
        self._nodes[id(tensor)] = (tensor, node)
        return node

    def _node(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._node(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            kept = value.detach().clone()
            self._note(value, Node("", value.numel(), value.dtype, kept))
        return self._nodes[id(value)][1]

    def _depends(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(self._depends, value))
        return isinstance(value, Tensor) and self._is_variable(value)

    def _is_variable(self, tensor: Tensor) -> bool:
        found = self._nodes.get(id(tensor))
        return found is not None and found[1].value is None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(map(self._depends, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        name, overload = func.__name__.rsplit(".", 1)
        if name == "_local_scalar_dense":
            return self._answer(args[0])
        result = func(*args, **kwargs)
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        call = Call(
            name, overload, self._node(args), {k: self._node(v) for k, v in kwargs.items()}, []
        )
        # an operation in place returns its argument
        call.results = [
            self._nodes[id(r)][1]
            if id(r) in self._nodes
            else self._note(r, Node("", r.numel(), r.dtype))
            for r in results
        ]
        if name == "all" and overload == "default":
            self._all[call.results[0]] = call.args[0]
        else:
            self.record.calls.append(call)
        return result

    def _answer(self, asked: Tensor) -> bool:
        """Answer the host's read of a tensor, which may only ask whether flags are all set."""
        flags = self._all.get(self._node(asked))
        if flags is None:
            raise Unrecordable("a number is read by the host")
        if self._assume:
            self.record.assumptions.append(flags)
        return self._assume


def record(function: Callable[..., Any], inputs: Mapping[str, Tensor], *, assume: bool) -> Record:
    """Run ``function(inputs)`` and record its operations.

    Args:
        function: does the same operations for all values, but may ask whether flags are all set
            (``bool(flags.all())``). It changes its inputs in place.
        inputs: by name.
        assume: the answer to such questions.

    Raises:
        Unrecordable: the function reads any other value on the host.
    """
    recorder = _Recorder(inputs, assume)
    token = recorded.set(inputs)
    try:
        with torch.no_grad(), recorder:
            function(inputs)
    finally:
        recorded.reset(token)
    return recorder.record
