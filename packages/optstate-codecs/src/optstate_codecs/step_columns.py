"""The parameters and gradients of a step, by column, and comparisons with the step before.

The host limits a step of many small tensors. A function mapped over a column takes a fraction of
the time of a loop over rows, so everything that is looked at in each step is a column here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress, repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.request import ParamStep
from optstate_codecs.sharding import any_distributed, local_grad, local_of

__all__ = ["CachedSteps", "Gradients", "GroupColumns", "Row", "StepCache"]

Groups = Sequence[Mapping[str, Any]]
# a parameter's index counted over all groups, its group's number, itself, and its gradient if any
Row = tuple[int, int, Tensor, Tensor | None]
# cached sets of parameters; a GradientRelease steps one set per span of parameters
MAX_CACHED = 256
_PLAIN = {Tensor, torch.nn.Parameter}

_data_ptr, _stride = torch.Tensor.data_ptr, torch.Tensor.stride
_dtype, _shape, _device = attrgetter("dtype"), attrgetter("shape"), attrgetter("device")


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects."""
    return some is others or (len(some) == len(others) and all(map(is_, some, others)))


@dataclass(eq=False)
class Gradients:
    """The parameters that a step takes and their gradients, by column.

    No list is changed after the object is made, so that equal lists may be one object.

    Attributes:
        indices: of the parameters, counted over all groups.
        groups: the number of each parameter's group.
        params: the parameters, as in the groups.
        grads: their gradients; of DTensors the local shards.
        sharded: whether any gradient was a DTensor.
        addresses: of the gradients' first elements.
        dtypes: of the gradients.
        strides: of the gradients.
        layouts: the dtype and strides of each gradient.
    """

    indices: list[int]
    groups: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    sharded: bool = field(default=False, init=False)
    addresses: list[int] = field(default_factory=list, init=False)
    dtypes: list[torch.dtype] = field(default_factory=list, init=False)
    strides: list[tuple[int, ...]] = field(default_factory=list, init=False)
    layouts: list[Any] = field(default_factory=list, init=False)

    @property
    def rows(self) -> list[Row]:
        """The first four columns, one row per parameter."""
        return list(zip(self.indices, self.groups, self.params, self.grads, strict=True))

    def localize(self) -> None:
        """Replace DTensors by their local shards."""
        self.sharded = any_distributed(self.grads)
        if self.sharded:
            columns = zip(self.indices, self.params, self.grads, strict=True)
            self.grads = [local_grad(*row) for row in columns]

    def read(self) -> None:
        """Fill the columns after ``grads``, except ``layouts``.

        Raises:
            RuntimeError: a gradient has no address or no strides.
        """
        self.addresses = list(map(_data_ptr, self.grads))
        self.strides = list(map(_stride, self.grads))
        self.dtypes = list(map(_dtype, self.grads))


class GroupColumns:
    """All parameters of an optimizer, by column, for as long as its groups hold the same ones."""

    def __init__(self, groups: Groups) -> None:
        self._members = [list(group["params"]) for group in groups]
        self._params = list(chain.from_iterable(self._members))
        self._groups = [n for n, members in enumerate(self._members) for _ in members]
        self._indices = list(range(len(self._params)))

    def valid(self, groups: Groups) -> bool:
        """Whether the groups hold the same parameters."""
        return len(groups) == len(self._members) and all(
            _same(group["params"], members)
            for group, members in zip(groups, self._members, strict=True)
        )

    def gradients(self) -> Gradients:
        """The parameters that have gradients now; the same lists each time where all have."""
        grads: list[Any] = [param.grad for param in self._params]
        columns = self._indices, self._groups, self._params
        if not any(map(is_, grads, repeat(None))):
            return Gradients(*columns, grads)
        has = [grad is not None for grad in grads]
        indices, groups, params = (list(compress(column, has)) for column in columns)
        return Gradients(indices, groups, params, list(compress(grads, has)))


class CachedSteps:
    """The parameter steps of a set of parameters, and what they were made from.

    Attributes:
        param_steps: one per parameter.
        indices: of the parameters, counted over all groups.
        addresses, dtypes, strides, layouts: of the latest valid gradients.
    """

    def __init__(
        self, given: Gradients, specs: Sequence[object], param_steps: list[ParamStep]
    ) -> None:
        self.indices, self.param_steps = given.indices, param_steps
        self.note(given)
        self._params, self._specs = given.params, specs
        self._states: list[dict[str, Any]] = [step.state for step in param_steps]
        self._sharded = any_distributed(given.params)
        used = [(step.state, set(step.keys)) for step in param_steps]
        self._keys = list(chain.from_iterable(self._states))
        self._used = [key in keys for state, keys in used for key in state]
        self._devices = list(map(_device, self._local_params()))
        self._params_now, self._state_now = self._where_params(), self._where_state()

    def valid(self, given: Gradients, specs: Sequence[object], states: Mapping[Any, Any]) -> bool:
        """Whether parameters, state and formats are the same, with the same memory and strides."""
        if not (
            _same(specs, self._specs)
            and _same(given.params, self._params)
            and self._has_states(states)
            and self._params_now == self._where_params()
            and self._keys == list(chain.from_iterable(self._states))
        ):
            return False
        try:
            return self._state_now == self._where_state()
        except (TypeError, RuntimeError):  # a value is no tensor, or one without memory
            return False

    def _has_states(self, states: Mapping[Any, Any]) -> bool:
        """Whether the parameters have the same state; hashing each is only needed out of order."""
        in_order = len(states) == len(self._states) and all(map(is_, states, self._params))
        now = states.values() if in_order else map(states.get, self._params)
        return all(map(is_, now, self._states))

    def same_layouts(self, given: Gradients) -> bool:
        """Whether gradients have the dtypes and strides of the latest valid ones."""
        return given.strides == self.strides and given.dtypes == self.dtypes

    def note(self, given: Gradients) -> None:
        """Take the columns of valid gradients, but not the gradients, which may be freed."""
        self.addresses, self.dtypes = given.addresses, given.dtypes
        self.strides, self.layouts = given.strides, given.layouts

    def fit(self, given: Gradients) -> bool:
        """Whether gradients with the latest layouts and other addresses can be stepped.

        False is no proof that they cannot.
        """
        return (
            not self._sharded
            and _PLAIN.issuperset(map(type, given.grads))
            and self._params_now[1] == list(map(_shape, given.grads))
            and self._devices == list(map(_device, given.grads))
        )

    def _local_params(self) -> list[Tensor]:
        return list(map(local_of, self._params)) if self._sharded else self._params

    def _where_params(self) -> tuple[list[Any], ...]:
        params = self._local_params()
        return list(map(_data_ptr, params)), list(map(_shape, params)), list(map(_stride, params))

    def _where_state(self) -> list[int]:
        values = chain.from_iterable(map(dict.values, self._states))
        return list(map(_data_ptr, compress(values, self._used)))


class StepCache:
    """The ``CachedSteps`` of each set of parameters that had gradients."""

    def __init__(self) -> None:
        self._by_indices: dict[tuple[int, ...], CachedSteps] = {}
        self._latest: CachedSteps | None = None

    def find(self, given: Gradients) -> CachedSteps | None:
        """The entry for the same parameters, by index."""
        if self._latest is None or self._latest.indices is not given.indices:
            self._latest = self._by_indices.get(tuple(given.indices))
        return self._latest

    def put(self, given: Gradients, steps: CachedSteps) -> None:
        """Keep the entry for these parameters."""
        if len(self._by_indices) >= MAX_CACHED:
            # models that route have ever new sets of parameters with gradients
            self._by_indices.clear()
        self._by_indices[tuple(given.indices)] = self._latest = steps

    def clear(self) -> None:
        """Drop all entries."""
        self._by_indices.clear()
        self._latest = None
