"""Saves plain and packed state dicts of a wrapped optimizer; ``loading`` loads both.

A plain state dict is the inner optimizer's own, decoded. A packed one has ``torch.optim``'s layout
(``state`` by parameter number, ``param_groups``), but each state is as it is stored:

- ``parts``: a list with one record for each chunk of the parameter. A coded tensor in a record is a
  dict of its format's text, its components and their layout.
- ``order``: of several chunks, the order of the parameter's dimensions in memory when it was split.
- ``foreign``: the entries that the optimizer did not make.

Both kinds have a key ``optstate_wrap``, which ``torch.optim`` ignores, with the policy's progress
and, if plain, the keys of foreign entries. A packed one that trainers see has it in each state too:
``torch.distributed.checkpoint`` keeps ``state`` and ``param_groups`` only.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.flat_params import is_flat
from optstate_codecs.plain import plain_value
from optstate_codecs.sharding import is_distributed
from optstate_wrap.hooks import STATE_DICT_HOOKS, save_with_hooks
from optstate_wrap.state.decoded import DecodedStates
from optstate_wrap.state.ranks import rank_key
from optstate_wrap.state.record import Coded, Record, stored_tensor
from optstate_wrap.state.shards import local_record, shards_of

__all__ = [
    "KEY",
    "independent_copy",
    "packed",
    "packed_for_trainers",
    "params_by_number",
    "plain",
    "progress_of_states",
]

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
    """The state in its stored form, about as large as it is stored.

    Args:
        states: of the inner optimizer.
        per_rank: save the state of ``DTensor``s as this worker's own, under ``ranks.rank_key()``,
            instead of as ``DTensor``s.

    Raises:
        ValueError: not ``per_rank``, and a value cannot be shown as a ``DTensor``.
    """
    inner, store = states.encoder.inner, states.store
    states.write_back()
    saved = Optimizer.state_dict(_GroupsOnly(inner))
    state: dict[Any, Any] = {key: independent_copy(value) for key, value in states.extra.items()}
    for number, param in params_by_number(saved, inner).items():
        entry: dict[str, Any] = {}
        if param in store:
            records = store.records(param)
            if is_distributed(param):
                records = [
                    local_record(record, param) if per_rank else shards_of(number, record, param)
                    for record in records
                ]
            entry["parts"] = [_packed_record(record) for record in records]
            if len(records) > 1:
                entry["order"] = list(store.layout(param).order)
        if param in states.foreign:
            foreign = states.foreign[param]
            if is_distributed(param) and not per_rank:
                foreign = shards_of(number, foreign, param)
            entry["foreign"] = {key: independent_copy(value) for key, value in foreign.items()}
        if entry and is_distributed(param) and per_rank:
            entry = {rank_key(): entry}
        if entry:
            state[number] = entry
    groups = plain_value(saved["param_groups"])
    progress = {**_progress(states), "packed": True}
    return {**saved, "state": state, "param_groups": groups, KEY: progress}


def packed_for_trainers(wrapper: Optimizer, states: DecodedStates) -> StateDict:
    """What ``packed`` returns, as the result of ``wrapper.state_dict()``.

    Args:
        wrapper: the optimizer whose state dict hooks are called.
        states: of the inner optimizer.

    Raises:
        ValueError: as ``packed``; or a parameter is a flat one of FSDP1, which gathers state
            element by element.
    """
    inner = states.encoder.inner
    if any(is_flat(param) for group in inner.param_groups for param in group["params"]):
        raise ValueError(
            "packed_checkpoints=True: FSDP1 can gather decoded state only; use "
            "packed_checkpoints=False, or FSDP2 (fully_shard)"
        )

    def save() -> StateDict:
        saved = packed(states)
        numbers = params_by_number(saved, inner)
        for number in numbers.keys() & saved["state"].keys():
            saved["state"][number][KEY] = copy.deepcopy(saved[KEY])
        return saved

    return save_with_hooks(wrapper, inner, save)


def progress_of_states(saved: Mapping[Any, Any]) -> Mapping[str, Any]:
    """The progress that ``packed_for_trainers`` keeps in each state; empty if there is none."""
    for state in saved.values():
        if isinstance(state, Mapping) and isinstance(state.get(KEY), Mapping):
            progress: Mapping[str, Any] = state[KEY]
            return progress
    return {}


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
            "parts": [_packed_part(part) for part in value.parts],
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "order": list(value.order),
            "root": value.root,
        }
        if isinstance(value, Coded)
        else independent_copy(value)
        for key, value in record.items()
    }


def _packed_part(part: Tensor) -> Tensor:
    """A copy on the host; shards, which ``shards_of`` has copied, stay where they can be sent."""
    return part if is_distributed(part) else part.to("cpu", copy=True)


def independent_copy(value: Any) -> Any:
    """A copy with storage of its own, which no step changes."""
    value = stored_tensor(value)
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
