"""Loading state dicts, plain and packed: all is checked and converted before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.formats import as_format
from optstate_codecs.state.groups import merged_groups
from optstate_wrap.hooks import load_with_hooks
from optstate_wrap.probe import Findings, why_not
from optstate_wrap.state.checkpoint import KEY, alone, numbered
from optstate_wrap.state.inference import ordinary_tensors
from optstate_wrap.state.parts import cut, joined, length, pieces_like
from optstate_wrap.state.record import Coded, Record, decode_state
from optstate_wrap.step.pieces import Layout, ParamChunk

if TYPE_CHECKING:
    from optstate_wrap.wrapper import OptimizerWrapper

__all__ = ["load"]


def load(wrapper: OptimizerWrapper, state_dict: Mapping[str, Any]) -> None:
    """Check and convert the whole of ``state_dict``, then put it in place.

    Under ``torch.inference_mode()`` too, what is loaded may be stepped outside of it.
    """
    with ordinary_tensors():
        load_with_hooks(wrapper, wrapper.inner, state_dict, partial(_load, wrapper))


def _load(wrapper: OptimizerWrapper, state_dict: Mapping[str, Any]) -> None:
    engine, inner, states = wrapper.engine, wrapper.inner, wrapper.engine.states
    policy = wrapper.policy
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"state_dict: missing key {key!r}")
    progress, saved = state_dict.get(KEY, {}), state_dict["state"]
    groups = merged_groups(
        "state_dict['param_groups']", inner.param_groups, state_dict["param_groups"]
    )
    params = numbered(state_dict, inner)
    # a key that is no number is the optimizer's own business
    unknown = [n for n in saved if n not in params and isinstance(n, int)]
    if unknown:
        raise KeyError(f"state_dict['state']: unknown parameter {unknown[0]!r}")

    before = [dict(group) for group in inner.param_groups]
    steps, progressed = engine.steps, copy.deepcopy(policy.state_dict())
    try:
        _fill(inner.param_groups, groups)
        wrapper.examine()
        engine.steps = int(progress.get("steps", _steps_of(saved)))
        if "policy" in progress:
            policy.load_state_dict(progress["policy"])
        entries = _entries(saved, params, wrapper.findings, progress)
        new = _records(wrapper, entries, bool(progress.get("packed")))
        foreign = {
            entry.param: {key: _own(value, entry.param) for key, value in entry.foreign.items()}
            for entry in entries
            if entry.foreign
        }
        extra = {key: alone(value) for key, value in saved.items() if key not in params}
        states.forget()
        engine.fused.forget()
        engine.store.replace(new)
    except BaseException:
        _fill(inner.param_groups, before)
        wrapper.examine()
        engine.steps = steps
        policy.load_state_dict(progressed)
        raise
    states.foreign, states.extra = foreign, extra


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


@dataclass
class _Entry:
    """What is saved of a parameter.

    Attributes:
        where: in the state dict.
        param: whose it is.
        own: the optimizer's own state, decoded or, for each part, packed.
        foreign: what the optimizer does not make.
        order: of the parameter's dimensions in memory when it was cut.
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
    wrapper: OptimizerWrapper, entries: Sequence[_Entry], is_packed: bool
) -> dict[Tensor, list[Record]]:
    """The records of every saved state, one parameter after the other."""
    engine, findings = wrapper.engine, wrapper.findings
    plan: dict[Tensor, list[ParamChunk]] = {}
    for piece in engine.encoder.plan():
        plan.setdefault(piece.param, []).append(piece)
    groups = {p: group for group in engine.inner.param_groups for p in group["params"]}
    new: dict[Tensor, list[Record]] = {}
    for entry in entries:
        param, state = entry.param, entry.own
        if not state:
            continue
        if is_packed:
            records = _unpacked(entry, engine.inner, findings)
            if _cut_alike(entry, records, plan[param]):
                new[param] = engine.store.placed([records])[0]
                continue
            of = pieces_like(param, [length(record) for record in records])
            layout = _layout(entry)
            state = joined([decode_state(record, param) for record in records], of, layout)
        _check(entry.where, state, param, findings)
        records = []
        for piece in plan[param]:
            part = {
                key: _placed(key, value, param, groups[param], findings, is_packed)
                for key, value in cut(state, piece).items()
            }
            records.append(engine.encoder.encode(piece, piece.data(), part))
        new[param] = engine.store.placed([records])[0]
    return new


def _cut_alike(entry: _Entry, records: Sequence[Record], pieces: Sequence[ParamChunk]) -> bool:
    """Whether records are of the very pieces that a parameter is stepped in."""
    if len(records) == len(pieces) == 1:
        return True
    lengths = [piece.stop - piece.start for piece in pieces]
    alike = [length(record) for record in records] == lengths
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
    lengths = [length(record) for record in records]
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
