"""Plain and packed state dicts; ``loading`` takes either.

A packed state dict is ``torch.optim``'s layout (``state`` by parameter number, ``param_groups``)
with what is stored in place of a state: ``{"parts": [record, ...]}``, one record for each part of
the parameter, in which a coded tensor is a dict of its format's text and its components; with the
``order`` of its dimensions in memory by which it was cut; and with the ``foreign`` entries that the
optimizer does not make. Both kinds have a key ``optstate_wrap`` with the policy's progress and the
keys of foreign entries, which ``torch.optim`` passes over.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.plain import plain_value
from optstate_wrap.hooks import STATE_DICT_HOOKS, save_with_hooks
from optstate_wrap.state.decoded import DecodedStates
from optstate_wrap.state.record import Coded, OffloadedTensor, Record

__all__ = ["KEY", "independent_copy", "packed", "params_by_number", "plain"]

KEY = "optstate_wrap"
StateDict = dict[str, Any]


def plain(wrapper: Optimizer, states: DecodedStates) -> StateDict:
    """The inner optimizer's own state dict, decoded, with the policy's progress.

    What is decoded for other devices goes to the host, one parameter after the other: a device may
    have no room for it.
    """
    inner, progress = states.encoder.inner, dict[str, Any]()

    def save() -> StateDict:
        saved = _decoded(states)
        progress.update(_progress(states))
        if foreign := states.foreign:
            of = {n: list(foreign.get(p, ())) for n, p in params_by_number(saved, inner).items()}
            progress["foreign"] = {number: keys for number, keys in of.items() if keys}
        return saved

    return {**save_with_hooks(wrapper, inner, save), KEY: progress}


def _decoded(states: DecodedStates) -> StateDict:
    """The inner optimizer's own state dict, with the state that is stored."""
    inner = states.encoder.inner
    kept = inner.state
    inner.state = defaultdict(dict, {param: _on_host(states.copy(param)) for param in states})
    inner.state.update(states.extra)
    try:
        return inner.state_dict()
    finally:
        inner.state = kept


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.cpu()
        if isinstance(value, Tensor) and value.dim() and not hasattr(value, "to_local")
        else value
        for key, value in state.items()
    }


def packed(states: DecodedStates) -> StateDict:
    """What is stored, as it is stored: about as large as the state."""
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
            entry["foreign"] = {
                k: independent_copy(value) for k, value in states.foreign[param].items()
            }
        if entry:
            state[number] = entry
    groups = plain_value(saved["param_groups"])
    progress = {**_progress(states), "packed": True}
    return {**saved, "state": state, "param_groups": groups, KEY: progress}


def params_by_number(saved: Mapping[str, Any], inner: Optimizer) -> dict[int, Tensor]:
    """The parameters by the numbers that a state dict gives them."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    params = [param for group in inner.param_groups for param in group["params"]]
    return dict(zip(numbers, params, strict=True))


class _GroupsOnly(Optimizer):
    """An optimizer's groups without its state, so that torch numbers them."""

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
    """A copy that no step changes, with a storage of its own."""
    value = value.tensor if isinstance(value, OffloadedTensor) else value
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
