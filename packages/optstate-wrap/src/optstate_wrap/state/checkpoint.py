"""Saves plain and packed state dicts of a wrapped optimizer; ``loading`` loads both.

A plain state dict is the inner optimizer's own, decoded. A packed one has ``torch.optim``'s layout
(``state`` by parameter number, ``param_groups``), but each state is as it is stored:

- ``parts``: a list with one record for each chunk of the parameter. A coded tensor in a record is a
  dict of its format's text, its components and their layout.
- ``order``: of several chunks, the order of the parameter's dimensions in memory when it was split.
- ``foreign``: the entries that the optimizer did not make.

Both kinds have a key ``optstate_wrap``, which ``torch.optim`` ignores, with the policy's progress
and, if plain, the keys of foreign entries.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.plain import plain_value
from optstate_codecs.sharding import is_distributed
from optstate_wrap.hooks import STATE_DICT_HOOKS, save_with_hooks
from optstate_wrap.state.decoded import DecodedStates
from optstate_wrap.state.ranks import rank_key
from optstate_wrap.state.record import Coded, Record, stored_tensor

__all__ = ["KEY", "independent_copy", "packed", "params_by_number", "plain"]

KEY = "optstate_wrap"
StateDict = dict[str, Any]


def plain(wrapper: Optimizer, states: DecodedStates) -> StateDict:
    """The inner optimizer's own state dict, decoded, with the policy's progress.

    Decoded state goes to the host, one parameter after the other, since a device may have no room
    for all of it.

    Args:
        wrapper: the optimizer whose state dict hooks are called.
        states: of the inner optimizer.
    """
    inner, progress = states.encoder.inner, dict[str, Any]()

    def save() -> StateDict:
        saved = _decoded(states)
        progress.update(_progress(states))
        if foreign := states.foreign:
            params = params_by_number(saved, inner)
            keys = {number: list(foreign.get(param, ())) for number, param in params.items()}
            progress["foreign"] = {number: names for number, names in keys.items() if names}
        return saved

    return {**save_with_hooks(wrapper, inner, save), KEY: progress}


def _decoded(states: DecodedStates) -> StateDict:
    inner = states.encoder.inner
    empty = inner.state
    inner.state = defaultdict(dict, {param: _on_host(states.copy(param)) for param in states})
    inner.state.update(states.extra)
    try:
        return inner.state_dict()
    finally:
        inner.state = empty


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.cpu()
        if isinstance(value, Tensor) and value.dim() and not hasattr(value, "to_local")
        else value
        for key, value in state.items()
    }


def packed(states: DecodedStates, per_rank: bool = False) -> StateDict:
    """The state as it is stored, and about as large.

    Args:
        states: of the inner optimizer.
        per_rank: keep the state of ``DTensor``s as this worker's own, under ``ranks.rank_key()``.

    Raises:
        ValueError: a parameter is a ``DTensor``, and not ``per_rank``.
    """
    inner, store = states.encoder.inner, states.store
    states.write_back()
    saved = Optimizer.state_dict(_GroupsOnly(inner))
    state: dict[Any, Any] = {key: independent_copy(value) for key, value in states.extra.items()}
    for number, param in params_by_number(saved, inner).items():
        entry: dict[str, Any] = {}
        if param in store:
            records = store.records(param)
            entry["parts"] = [_packed_record(record) for record in records]
            if len(records) > 1:
                entry["order"] = list(store.layout(param).order)
        if param in states.foreign:
            foreign = states.foreign[param]
            entry["foreign"] = {key: independent_copy(value) for key, value in foreign.items()}
        if entry and is_distributed(param):
            if not per_rank:
                raise ValueError(
                    f"packed_state_dict: parameter {number} is a DTensor, of which this worker has "
                    "a shard; use state_dict(), which loads on any number of workers, or "
                    "packed_state_dict(per_rank=True), which each worker saves for itself"
                )
            entry = {rank_key(): entry}
        if entry:
            state[number] = entry
    groups = plain_value(saved["param_groups"])
    progress = {**_progress(states), "packed": True}
    return {**saved, "state": state, "param_groups": groups, KEY: progress}


def params_by_number(saved: Mapping[str, Any], inner: Optimizer) -> dict[int, Tensor]:
    """The parameters by their numbers in a state dict."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    params = [param for group in inner.param_groups for param in group["params"]]
    return dict(zip(numbers, params, strict=True))


class _GroupsOnly(Optimizer):
    """An optimizer's groups without its state, so that torch numbers the parameters."""

    def __init__(self, inner: Optimizer) -> None:
        self.param_groups = inner.param_groups
        self.state = defaultdict(dict)
        self.defaults = inner.defaults
        for name in STATE_DICT_HOOKS:
            setattr(self, name, {})


def _progress(states: DecodedStates) -> dict[str, Any]:
    return {"steps": states.encoder.steps, "policy": states.encoder.policy.state_dict()}


def _packed_record(record: Record) -> dict[str, Any]:
    return {
        key: {
            "format": value.format.spec,
            "parts": [part.to("cpu", copy=True) for part in value.parts],
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "order": list(value.order),
            "root": value.root,
        }
        if isinstance(value, Coded)
        else independent_copy(value)
        for key, value in record.items()
    }


def independent_copy(value: Any) -> Any:
    """A copy with storage of its own, which no step changes."""
    value = stored_tensor(value)
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
