"""Loads plain and packed state dicts: checks and converts all values before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.counts import checked_count
from optstate_codecs.sharding import is_distributed, local_of
from optstate_codecs.state.components import check_dense
from optstate_codecs.state.groups import merged_groups
from optstate_codecs.state.structure import check_structure, check_values, malformed
from optstate_wrap.hooks import load_with_hooks
from optstate_wrap.probe import Findings, probe, why_not
from optstate_wrap.state.checkpoint import (
    KEY,
    independent_copy,
    params_by_number,
    progress_of_states,
)
from optstate_wrap.state.decoded import DecodedStates
from optstate_wrap.state.inference import ordinary_tensors
from optstate_wrap.state.param_chunks import Layout, ParamChunk
from optstate_wrap.state.progress import checked_progress, load_policy, steps_of
from optstate_wrap.state.ranks import of_this_rank
from optstate_wrap.state.record import Coded, Record, decode_state
from optstate_wrap.state.shards import (
    as_shard,
    of_local,
    shard_of,
    whole_of,
    whole_record,
)
from optstate_wrap.state.slicing import chunks_of_lengths, join_states, record_numel, slice_state
from optstate_wrap.state.unpacking import check_together, coded_tensor, copy_to

__all__ = ["load"]

Examine = Callable[[], Findings]


def load(
    wrapper: Optimizer, states: DecodedStates, examine: Examine, state_dict: Mapping[str, Any]
) -> None:
    """Check and convert the whole of ``state_dict``, then replace the optimizer's state by it.

    State loaded under ``torch.inference_mode()`` can be stepped outside of it.

    Args:
        wrapper: the optimizer whose state dict hooks are called.
        states: of the inner optimizer.
        examine: probes the inner optimizer with the hyper-parameters that it has then.
        state_dict: plain or packed.
    """
    with ordinary_tensors():
        inner = states.encoder.inner
        load_with_hooks(wrapper, inner, state_dict, partial(_load, states, examine))


def _load(states: DecodedStates, examine: Examine, state_dict: Mapping[str, Any]) -> None:
    encoder = states.encoder
    inner, policy = encoder.inner, encoder.policy
    check_structure(state_dict, inner.param_groups)
    saved = state_dict["state"]
    progress = checked_progress(state_dict.get(KEY, {}))
    progress = progress or checked_progress(progress_of_states(saved))
    where, saved_groups = "state_dict['param_groups']", state_dict["param_groups"]
    with malformed(where):
        check = lambda new, saved: check_values(saved, new["params"])  # noqa: E731
        groups = merged_groups(where, inner.param_groups, saved_groups, check=check)
    params = params_by_number(state_dict, inner)
    # keys that are not numbers are the inner optimizer's own entries
    if unknown := [n for n in saved if n not in params and isinstance(n, int)]:
        raise KeyError(f"state_dict['state']: unknown parameter {unknown[0]!r}")

    could = probe(inner).tried
    before = [dict(group) for group in inner.param_groups]
    steps, progressed = encoder.steps, copy.deepcopy(policy.state_dict())
    try:
        _fill(inner.param_groups, groups)
        if could and not probe(inner).tried:
            raise ValueError(f"{where}: {type(inner).__name__} cannot step with these values")
        findings = examine()
        with malformed("state_dict"):
            encoder.steps = progress["steps"] if "steps" in progress else steps_of(saved)
            if "policy" in progress:
                load_policy(policy, progress["policy"])
            entries = _entries(saved, params, findings, progress)
            new = _records(states, findings, entries, bool(progress.get("packed")))
            foreign = {
                entry.param: {k: copy_to(entry.param, v) for k, v in entry.foreign.items()}
                for entry in entries
                if entry.foreign
            }
            extra = {k: independent_copy(v) for k, v in saved.items() if k not in params}
        states.replace(new, foreign, extra)
    except BaseException:
        _fill(inner.param_groups, before)
        examine()
        encoder.steps = steps
        policy.load_state_dict(progressed)
        raise


def _fill(groups: Sequence[dict[str, Any]], values: Sequence[Mapping[str, Any]]) -> None:
    """Replace the values of groups, which stay the same objects since schedulers hold them."""
    for group, new in zip(groups, values, strict=True):
        for key in set(group) - set(new):
            del group[key]
        group.update(new)


@dataclass
class _Entry:
    """The saved state of a parameter.

    Attributes:
        where: its place in the state dict, for messages.
        param: the parameter.
        own: the optimizer's own state: decoded, or a list of packed records.
        foreign: entries that the optimizer does not make.
        order: of the parameter's dimensions in memory when it was split; None: unknown.
        per_rank: whether packed records are of this worker's shard, not of the whole parameter.
    """

    where: str
    param: Tensor
    own: Any
    foreign: Mapping[str, Any]
    order: Sequence[int] | None = None
    per_rank: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that packed records are the state of."""
        return tuple((local_of(self.param) if self.per_rank else self.param).shape)


def _entries(
    saved: Mapping[Any, Any],
    params: Mapping[Any, Tensor],
    findings: Findings,
    progress: Mapping[str, Any],
) -> list[_Entry]:
    """The saved state of each parameter, split into the optimizer's own and foreign entries."""
    states = {number: saved[number] for number in params if number in saved}
    entries = []
    for number, state in states.items():
        where, param = f"state_dict['state'][{number!r}]", params[number]
        if not isinstance(state, Mapping):
            raise TypeError(f"{where}: must be a dict, got {type(state).__name__}")
        if progress.get("packed"):
            packed = of_this_rank(where, state)
            foreign = packed.get("foreign", {})
            if "parts" not in packed and not foreign:
                raise KeyError(f"{where}: missing key 'parts'")
            own, order = packed.get("parts", ()), packed.get("order")
            entries.append(_Entry(where, param, own, foreign, order, packed is not state))
            continue
        marked = progress.get("foreign", {}).get(number, ())
        known = findings.known
        foreign = {
            key: value
            for key, value in state.items()
            if key in marked or (known is not None and key not in known)
        }
        own = {key: value for key, value in state.items() if key not in foreign}
        # A state without own keys is valid if its keys were saved as foreign, or if another state
        # has own keys. Otherwise the state dict is another optimizer's.
        if own or not (
            foreign.keys() <= set(marked)
            or any(findings.keys.keys() & other for other in states.values())
        ):
            _check_keys(where, state, findings)
        entries.append(_Entry(where, param, own, foreign))
    return entries


def _records(
    states: DecodedStates, findings: Findings, entries: Sequence[_Entry], packed: bool
) -> dict[Tensor, list[Record]]:
    """The records of all saved states, as the store keeps them."""
    encoder, store = states.encoder, states.store
    chunks: dict[Tensor, list[ParamChunk]] = {}
    for chunk in encoder.split():
        chunks.setdefault(chunk.param, []).append(chunk)
    groups = {p: group for group in encoder.inner.param_groups for p in group["params"]}
    new: dict[Tensor, list[Record]] = {}
    for entry in entries:
        param, state = entry.param, entry.own
        if not state:
            continue
        if packed:
            records = _unpacked(entry, encoder.inner, findings)
            shared = is_distributed(param) and not entry.per_rank
            own = shard_of(records[0], param) if shared and len(records) == 1 else None
            if own is not None or (not shared and _split_alike(entry, records, chunks[param])):
                new[param] = store.to_store([records if own is None else [own]])[0]
                continue
            stored = chunks_of_lengths(param, list(map(record_numel, records)))
            decoded = [
                decode_state(whole_record(record, param.device))
                if shared
                else decode_state(record, param)
                for record in records
            ]
            state = join_states(decoded, stored, _layout(entry))
            if shared:
                state = {key: as_shard(value, param) for key, value in state.items()}
        _check(entry.where, state, param, findings)
        records = []
        for chunk in chunks[param]:
            sliced = {
                key: _converted(key, value, param, groups[param], findings, packed)
                for key, value in slice_state(state, chunk).items()
            }
            records.append(encoder.encode(chunk, chunk.data(), sliced))
        new[param] = store.to_store([records])[0]
    return new


def _split_alike(entry: _Entry, records: Sequence[Record], chunks: Sequence[ParamChunk]) -> bool:
    """Whether the saved records are split as the parameter is now."""
    if len(records) == len(chunks) == 1:
        return True
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    return list(map(record_numel, records)) == lengths and _layout(entry) == Layout.of(entry.param)


def _layout(entry: _Entry) -> Layout:
    """The layout by which the saved records were split."""
    now = Layout.of(entry.param)
    if entry.order is None:
        return now
    if sorted(entry.order) != list(range(entry.param.dim())):
        raise ValueError(
            f"{entry.where}['order']={entry.order!r}: must have each of the {entry.param.dim()} "
            "dimensions once"
        )
    return Layout(now.shape, tuple(entry.order))


def _unpacked(entry: _Entry, inner: Optimizer, findings: Findings) -> list[Record]:
    """The records of a packed state, checked and on the parameter's device."""
    where, param = entry.where, entry.param
    records = []
    if not isinstance(entry.own, (list, tuple)) or not all(
        isinstance(saved, Mapping) for saved in entry.own
    ):
        raise TypeError(f"{where}['parts']={entry.own!r:.80}: must be a list of dicts")
    for saved in entry.own:
        _check_keys(where, saved, findings)
        if other := [key for key in saved if not isinstance(key, str)]:
            raise TypeError(f"{where}: key {other[0]!r:.80}: must be text")
        record: Record = {}
        for key, value in saved.items():
            if isinstance(value, Mapping) and "format" in value:
                record[key] = coded_tensor(f"{where}[{key!r}]", value, param, entry.per_rank)
            else:
                _check_value(f"{where}[{key!r}]", key, value, param, findings)
                given = value if is_distributed(param) else whole_of(value)
                record[key] = copy_to(param, given)
                if key == "step" and findings.counts_in_tensors:
                    record[key] = _step_count(given)
                if entry.per_rank:
                    record[key] = of_local(record[key], param)
        check_together(where, record)
        records.append(record)
    lengths = list(map(record_numel, records))
    if len(records) > 1 and sum(lengths) != param.numel():
        raise ValueError(f"{where}: parts of {sum(lengths)} elements, must be {param.numel()}")
    for record, numel in zip(records, lengths, strict=True):
        shapes = entry.shape, tuple(param.shape)
        for key, value in record.items():
            elementwise = key in findings.elementwise
            if elementwise and value is None and key in findings.optional:
                continue
            if not (elementwise or isinstance(value, Coded)):
                continue
            if key in findings.keys and not elementwise:
                raise ValueError(f"{where}[{key!r}]: must not be coded, has no entry per element")
            if not isinstance(value, (Coded, Tensor)):
                raise TypeError(f"{where}[{key!r}]={value!r:.80}: must be a tensor")
            shape = (numel,) if len(records) > 1 else shapes[not isinstance(value, Coded)]
            if tuple(value.shape) != shape:
                raise ValueError(f"{where}[{key!r}]: shape {tuple(value.shape)}, must be {shape}")
            dtype = findings.keys.get(key) or param.dtype
            if value.dtype != dtype and why_not(inner, param.dtype, param.dtype, value.dtype):
                # convert, as torch.optim does
                record[key] = (
                    replace(value, dtype=dtype) if isinstance(value, Coded) else value.to(dtype)
                )
    return records


def _check(where: str, state: Mapping[str, Any], param: Tensor, findings: Findings) -> None:
    _check_keys(where, state, findings)
    for key, value in state.items():
        _check_value(f"{where}[{key!r}]", key, value, param, findings)
    for key in findings.elementwise & state.keys():
        value = state[key]
        if value is None and key in findings.optional:
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        if shape != tuple(param.shape):
            raise ValueError(f"{where}[{key!r}]: shape {shape}, must be {tuple(param.shape)}")


def _check_value(where: str, key: str, value: Any, param: Tensor, findings: Findings) -> None:
    """Raise if a value is a tensor without numbers, or a step count that is none."""
    if isinstance(value, Tensor):
        check_dense(where, local_of(value))
        if value.is_meta and not param.is_meta:
            raise ValueError(f"{where}: is on meta, without values")
    if key == "step" and key in findings.keys:
        checked_count(where, value)


def _check_keys(where: str, state: Mapping[str, Any], findings: Findings) -> None:
    if missing := sorted(findings.keys.keys() - state.keys()):
        unknown = sorted(map(repr, state.keys() - (findings.known or set())))
        beside = f"; it has {', '.join(unknown)}" if unknown else ""
        raise KeyError(f"{where}: missing key {missing[0]!r}{beside}")


def _converted(
    key: str, value: Any, param: Tensor, group: Mapping[str, Any], findings: Findings, packed: bool
) -> Any:
    """A copy of a saved value, on the device and in the dtype that the optimizer would use."""
    if key == "step" and key in findings.keys and findings.counts_in_tensors:
        value = _step_count(value)
    if not isinstance(value, Tensor):
        return copy_to(param, value)
    if key == "step":
        on_device = group.get("capturable") or group.get("fused")
        return value.to(param.device, torch.float32, copy=True) if on_device else value.clone()
    if not param.is_floating_point() or packed:
        return value.detach().to(param.device, copy=True)
    dtype = findings.keys.get(key) or param.dtype
    return value.detach().to(param.device, dtype, copy=True)


def _step_count(value: Any) -> Tensor:
    """A checked step count as an optimizer keeps it: a 0-d tensor of floating dtype; a copy."""
    if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64):
        return value.detach().reshape(()).clone()
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")
