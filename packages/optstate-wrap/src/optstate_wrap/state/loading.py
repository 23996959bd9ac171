"""Loading state dicts, plain and packed: all is checked and converted before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.formats import as_format
from optstate_wrap.hooks import load_with_hooks
from optstate_wrap.probe import Findings, why_not
from optstate_wrap.state.checkpoint import KEY, independent_copy, params_by_number
from optstate_wrap.state.decoded import DecodedStates
from optstate_wrap.state.inference import ordinary_tensors
from optstate_wrap.state.param_chunks import Layout, ParamChunk
from optstate_wrap.state.record import Coded, Record, decode_state
from optstate_wrap.state.slicing import chunks_of_lengths, join_states, record_numel, slice_state

__all__ = ["load"]


def load(
    wrapper: Optimizer,
    states: DecodedStates,
    examine: Callable[[], Findings],
    state_dict: Mapping[str, Any],
) -> None:
    """Check and convert the whole of ``state_dict``, then put it in place.

    Under ``torch.inference_mode()`` too, what is loaded may be stepped outside of it.
    """
    with ordinary_tensors():
        inner = states.encoder.inner
        load_with_hooks(wrapper, inner, state_dict, partial(_load, states, examine))


def _load(
    states: DecodedStates, examine: Callable[[], Findings], state_dict: Mapping[str, Any]
) -> None:
    encoder = states.encoder
    inner, policy = encoder.inner, encoder.policy
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"state_dict: missing key {key!r}")
    progress, saved = state_dict.get(KEY, {}), state_dict["state"]
    groups = _merged_groups(inner, state_dict["param_groups"])
    params = params_by_number(state_dict, inner)
    # a key that is no number is the optimizer's own business
    unknown = [n for n in saved if n not in params and isinstance(n, int)]
    if unknown:
        raise KeyError(f"state_dict['state']: unknown parameter {unknown[0]!r}")

    before = [dict(group) for group in inner.param_groups]
    steps, progressed = encoder.steps, copy.deepcopy(policy.state_dict())
    try:
        _fill(inner.param_groups, groups)
        findings = examine()
        encoder.steps = int(progress.get("steps", _steps_of(saved)))
        if "policy" in progress:
            policy.load_state_dict(progress["policy"])
        entries = _entries(saved, params, findings, progress)
        new = _records(states, findings, entries, bool(progress.get("packed")))
        foreign = {
            entry.param: {key: _own(value, entry.param) for key, value in entry.foreign.items()}
            for entry in entries
            if entry.foreign
        }
        extra = {key: independent_copy(value) for key, value in saved.items() if key not in params}
        states.replace(new, foreign, extra)
    except BaseException:
        _fill(inner.param_groups, before)
        examine()
        encoder.steps = steps
        policy.load_state_dict(progressed)
        raise


def _steps_of(state: Mapping[Any, Any]) -> int:
    """How often a plain checkpoint's parameters were stepped."""
    counts = [s["step"] for s in state.values() if isinstance(s, Mapping) and "step" in s]
    return max(
        (int(count) for count in counts if isinstance(count, (int, float, Tensor))), default=0
    )


def _fill(groups: Sequence[dict[str, Any]], values: Sequence[Mapping[str, Any]]) -> None:
    """Give groups new values; they stay the objects that a scheduler holds."""
    for group, new in zip(groups, values, strict=True):
        for key in set(group) - set(new):
            del group[key]
        group.update(new)


def _merged_groups(
    inner: Optimizer, saved_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    where = "state_dict['param_groups']"
    if len(saved_groups) != len(inner.param_groups):
        raise ValueError(f"{where}: {len(saved_groups)} groups, must be {len(inner.param_groups)}")
    merged = []
    for i, (group, saved) in enumerate(zip(inner.param_groups, saved_groups, strict=True)):
        if "params" not in saved:
            raise KeyError(f"{where}[{i}]: missing key 'params'")
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"{where}[{i}]['params']: {len(saved['params'])} parameters, "
                f"must be {len(group['params'])}"
            )
        values = {key: copy.deepcopy(v) for key, v in saved.items() if key != "params"}
        merged.append({**group, **values})
    return merged


@dataclass
class _Entry:
    """What is saved of a parameter.

    Attributes:
        where: in the state dict.
        param: whose it is.
        own: the optimizer's own state, decoded or, for each part, packed.
        foreign: what the optimizer does not make.
        order: of the parameter's dimensions in memory when it was split.
    """

    where: str
    param: Tensor
    own: Any
    foreign: Mapping[str, Any]
    order: Sequence[int] | None = None


def _entries(
    saved: Mapping[Any, Any],
    params: Mapping[Any, Tensor],
    findings: Findings,
    progress: Mapping[str, Any],
) -> list[_Entry]:
    """What is saved of each parameter, with the optimizer's own keys told from foreign ones."""
    states = {number: saved[number] for number in params if number in saved}
    entries = []
    for number, state in states.items():
        where, param = f"state_dict['state'][{number!r}]", params[number]
        if not isinstance(state, Mapping):
            raise TypeError(f"{where}: must be a dict, got {type(state).__name__}")
        if progress.get("packed"):
            foreign = state.get("foreign", {})
            if "parts" not in state and not foreign:
                raise KeyError(f"{where}: missing key 'parts'")
            own = state.get("parts", ())
            entries.append(_Entry(where, param, own, foreign, state.get("order")))
            continue
        marked = progress.get("foreign", {}).get(number, ())
        known = findings.known
        theirs = {k for k in state if k in marked or (known is not None and k not in known)}
        own = {key: value for key, value in state.items() if key not in theirs}
        # where no state has any of the optimizer's keys, they are of another optimizer
        if own or not _all_foreign(theirs, marked, states.values(), findings):
            _check_keys(where, state, findings)
        entries.append(_Entry(where, param, own, {key: state[key] for key in theirs}))
    return entries


def _all_foreign(
    theirs: set[str],
    marked: Collection[str],
    states: Iterable[Any],
    findings: Findings,
) -> bool:
    """Whether the state of a parameter may have none of the optimizer's own keys."""
    return set(theirs) <= set(marked) or any(findings.keys.keys() & state for state in states)


def _records(
    states: DecodedStates, findings: Findings, entries: Sequence[_Entry], is_packed: bool
) -> dict[Tensor, list[Record]]:
    """The records of every saved state, one parameter after the other."""
    encoder, store = states.encoder, states.store
    plan: dict[Tensor, list[ParamChunk]] = {}
    for chunk in encoder.split():
        plan.setdefault(chunk.param, []).append(chunk)
    groups = {p: group for group in encoder.inner.param_groups for p in group["params"]}
    new: dict[Tensor, list[Record]] = {}
    for entry in entries:
        param, state = entry.param, entry.own
        if not state:
            continue
        if is_packed:
            records = _unpacked(entry, encoder.inner, findings)
            if _cut_alike(entry, records, plan[param]):
                new[param] = store.to_store([records])[0]
                continue
            of = chunks_of_lengths(param, [record_numel(record) for record in records])
            layout = _layout(entry)
            state = join_states([decode_state(record, param) for record in records], of, layout)
        _check(entry.where, state, param, findings)
        records = []
        for chunk in plan[param]:
            part = {
                key: _placed(key, value, param, groups[param], findings, is_packed)
                for key, value in slice_state(state, chunk).items()
            }
            records.append(encoder.encode(chunk, chunk.data(), part))
        new[param] = store.to_store([records])[0]
    return new


def _cut_alike(entry: _Entry, records: Sequence[Record], chunks: Sequence[ParamChunk]) -> bool:
    """Whether records are of the very chunks that a parameter is stepped in."""
    if len(records) == len(chunks) == 1:
        return True
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    alike = [record_numel(record) for record in records] == lengths
    return alike and _layout(entry) == Layout.of(entry.param)


def _layout(entry: _Entry) -> Layout:
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
    where, param = entry.where, entry.param
    records = []
    for saved in entry.own:
        _check_keys(where, saved, findings)
        record: Record = {}
        for key, value in saved.items():
            if isinstance(value, Mapping) and "format" in value:
                record[key] = _coded(f"{where}[{key!r}]", value, param)
            else:
                record[key] = _own(value, param)
        records.append(record)
    lengths = [record_numel(record) for record in records]
    if len(records) > 1 and sum(lengths) != param.numel():
        raise ValueError(f"{where}: parts of {sum(lengths)} elements, must be {param.numel()}")
    for record, numel in zip(records, lengths, strict=True):
        shape = tuple(param.shape) if len(records) == 1 else (numel,)
        for key, value in record.items():
            elementwise = key in findings.elementwise and isinstance(value, Tensor)
            if not (elementwise or isinstance(value, Coded)):
                continue
            if tuple(value.shape) != shape:
                raise ValueError(f"{where}[{key!r}]: shape {tuple(value.shape)}, must be {shape}")
            dtype = findings.keys.get(key) or param.dtype
            if value.dtype != dtype and why_not(inner, param.dtype, param.dtype, value.dtype):
                # as torch.optim does with what it loads
                record[key] = (
                    replace(value, dtype=dtype) if isinstance(value, Coded) else value.to(dtype)
                )
    return records


def _coded(where: str, saved: Mapping[str, Any], param: Tensor) -> Coded:
    missing = {"format", "parts", "dtype", "shape", "order", "root"} - saved.keys()
    if missing:
        raise KeyError(f"{where}: missing key {min(missing)!r}")
    shape, order = tuple(saved["shape"]), tuple(saved["order"])
    format = as_format(saved["format"])
    numel = torch.Size(shape).numel()
    components = format.for_shape(shape, order).components
    if len(saved["parts"]) != len(components):
        raise ValueError(f"{where}: {len(saved['parts'])} components, must be {len(components)}")
    for part, component in zip(saved["parts"], components, strict=True):
        if part.dtype != component.dtype or tuple(part.shape) != (component.length(numel),):
            raise ValueError(
                f"{where}: a component of shape {tuple(part.shape)} and dtype {part.dtype}, must "
                f"be {(component.length(numel),)} and {component.dtype}"
            )
    parts = tuple(_own(part, param) for part in saved["parts"])
    dtype = getattr(torch, saved["dtype"])
    return Coded(format, parts, dtype, shape, order, saved["root"])


def _own(value: Any, param: Tensor) -> Any:
    """A copy that nothing else holds; tensors with dimensions are beside the parameter."""
    if type(value) in (list, tuple):
        # as torch.optim.LBFGS keeps its history
        return type(value)(_own(item, param) for item in value)
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    device = param.device if value.dim() else value.device
    return value.detach().to(device, copy=True)


def _check(where: str, state: Mapping[str, Any], param: Tensor, findings: Findings) -> None:
    _check_keys(where, state, findings)
    for key in findings.elementwise & state.keys():
        value = state[key]
        if value is None and key in findings.optional:
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        if shape != tuple(param.shape):
            raise ValueError(f"{where}[{key!r}]: shape {shape}, must be {tuple(param.shape)}")


def _check_keys(where: str, state: Mapping[str, Any], findings: Findings) -> None:
    if missing := sorted(findings.keys.keys() - state.keys()):
        unknown = sorted(map(repr, state.keys() - (findings.known or set())))
        beside = f"; it has {', '.join(unknown)}" if unknown else ""
        raise KeyError(f"{where}: missing key {missing[0]!r}{beside}")


def _placed(
    key: str,
    value: Any,
    param: Tensor,
    group: Mapping[str, Any],
    findings: Findings,
    is_packed: bool,
) -> Any:
    """A saved value where and in the dtype in which the optimizer would have it; a copy."""
    if not isinstance(value, Tensor):
        if key == "step" and key in findings.keys and findings.counts_in_tensors:
            value = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        else:
            return _own(value, param)
    if key == "step":
        on_device = group.get("capturable") or group.get("fused")
        return value.to(param.device, torch.float32, copy=True) if on_device else value.clone()
    if not param.is_floating_point() or is_packed:
        return value.detach().to(param.device, copy=True)
    dtype = findings.keys.get(key) or param.dtype
    return value.detach().to(param.device, dtype, copy=True)
