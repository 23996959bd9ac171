"""Plain and packed state dicts, and loading either.

A packed state dict is ``torch.optim``'s layout (``state`` by parameter number, ``param_groups``)
with what is stored in place of a state: ``{"parts": [record, ...]}``, one record for each part of
the parameter, in which a coded tensor is a dict of its format's text and its components. Both kinds
have a key ``optstate_wrap`` with the policy's progress, which ``torch.optim`` passes over.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.formats import as_format
from optstate_codecs.plain import plain_value
from optstate_wrap.engine import Engine, length, pieces_like
from optstate_wrap.parts import cut, joined
from optstate_wrap.plan import Piece
from optstate_wrap.probe import Findings
from optstate_wrap.record import Coded, Record, decode_state
from optstate_wrap.store import Held

if TYPE_CHECKING:
    from optstate_wrap.wrapper import OptimizerWrapper

__all__ = ["KEY", "load", "packed", "plain"]

KEY = "optstate_wrap"
StateDict = dict[str, Any]


def plain(wrapper: OptimizerWrapper) -> StateDict:
    """The inner optimizer's own state dict, decoded, with the policy's progress.

    What is decoded for other devices goes to the host, one parameter after the other: a device may
    have no room for it.
    """
    inner, engine = wrapper.inner, wrapper.engine
    kept = inner.state
    inner.state = defaultdict(dict, {key: _on_host(wrapper.state[key]) for key in wrapper.state})
    try:
        saved = inner.state_dict()
    finally:
        inner.state = kept
    return {**saved, KEY: _progress(engine)}


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.cpu()
        if isinstance(value, Tensor) and value.dim() and not hasattr(value, "to_local")
        else value
        for key, value in state.items()
    }


def packed(wrapper: OptimizerWrapper) -> StateDict:
    """What is stored, as it is stored: about as large as the state."""
    engine = wrapper.engine
    saved = Optimizer.state_dict(_Hollow(wrapper.inner))
    state: dict[Any, Any] = copy.deepcopy(engine.extra)
    for number, param in enumerate(_params(engine)):
        if param in engine.store:
            records = engine.store.kept(param)
            state[number] = {"parts": [_packed_record(record) for record in records]}
    groups = plain_value(saved["param_groups"])
    progress = {**_progress(engine), "packed": True}
    return {**saved, "state": state, "param_groups": groups, KEY: progress}


class _Hollow(Optimizer):
    """An optimizer's groups without its state, so that torch numbers them."""

    def __init__(self, inner: Optimizer) -> None:
        self.param_groups = inner.param_groups
        self.state = defaultdict(dict)
        self.defaults = inner.defaults
        for name in ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks"):
            setattr(self, name, {})


def _progress(engine: Engine) -> dict[str, Any]:
    return {"steps": engine.steps, "policy": engine.policy.state_dict()}


def _params(engine: Engine) -> list[Tensor]:
    return [param for group in engine.inner.param_groups for param in group["params"]]


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
        else _alone(value)
        for key, value in record.items()
    }


def _alone(value: Any) -> Any:
    """A copy that no step changes, with a storage of its own."""
    value = value.tensor if isinstance(value, Held) else value
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def load(wrapper: OptimizerWrapper, state_dict: Mapping[str, Any]) -> None:
    """Check and convert the whole of ``state_dict``, then put it in place."""
    engine, inner = wrapper.engine, wrapper.inner
    state_dict = dict(state_dict)
    for hook in inner._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(wrapper, state_dict) or state_dict
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"state_dict: missing key {key!r}")
    progress = state_dict.get(KEY, {})
    groups = _merged_groups(inner, state_dict["param_groups"])
    numbers = [n for saved in state_dict["param_groups"] for n in saved["params"]]
    params = dict(zip(numbers, _params(engine), strict=True))
    # a key that is no number is the optimizer's own business
    foreign = [n for n in state_dict["state"] if n not in params and isinstance(n, int)]
    if foreign:
        raise KeyError(f"state_dict['state']: unknown parameter {foreign[0]!r}")

    before = [dict(group) for group in inner.param_groups]
    steps, policy = engine.steps, copy.deepcopy(engine.policy.state_dict())
    try:
        _fill(inner.param_groups, groups)
        wrapper.examine()
        engine.steps = int(progress.get("steps", _steps_of(state_dict["state"])))
        if "policy" in progress:
            engine.policy.load_state_dict(progress["policy"])
        new = _records(wrapper, state_dict["state"], params, bool(progress.get("packed")))
        engine.fused.forget()
        engine.store.replace(new)
    except BaseException:
        _fill(inner.param_groups, before)
        wrapper.examine()
        engine.steps = steps
        engine.policy.load_state_dict(policy)
        raise
    engine.extra = {n: copy.deepcopy(v) for n, v in state_dict["state"].items() if n not in params}
    for post_hook in inner._optimizer_load_state_dict_post_hooks.values():
        post_hook(wrapper)


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


def _records(
    wrapper: OptimizerWrapper,
    saved: Mapping[Any, Any],
    params: Mapping[Any, Tensor],
    is_packed: bool,
) -> dict[Tensor, list[Record]]:
    """The records of every saved state, one parameter after the other."""
    engine = wrapper.engine
    plan: dict[Tensor, list[Piece]] = {}
    for piece in engine.plan():
        plan.setdefault(piece.param, []).append(piece)
    groups = {p: group for group in engine.inner.param_groups for p in group["params"]}
    new: dict[Tensor, list[Record]] = {}
    for number, param in params.items():
        state = saved.get(number)
        if state is None or not (state or is_packed):
            continue
        where = f"state_dict['state'][{number!r}]"
        if is_packed:
            records = _unpacked(where, state, param, wrapper.findings)
            lengths = [piece.stop - piece.start for piece in plan[param]]
            if [length(record) for record in records] == lengths or len(records) == len(
                lengths
            ) == 1:
                new[param] = engine.store.placed([records])[0]
                continue
            of = pieces_like(param, [length(record) for record in records])
            state = joined([decode_state(record, param) for record in records], of)
        _check(where, state, param, wrapper.findings)
        records = []
        for piece in plan[param]:
            part = {
                key: _placed(key, value, param, groups[param], wrapper.findings, is_packed)
                for key, value in cut(state, piece).items()
            }
            records.append(engine.encode(piece, piece.data(), part))
        new[param] = engine.store.placed([records])[0]
    return new


def _unpacked(where: str, state: Any, param: Tensor, findings: Findings) -> list[Record]:
    if not isinstance(state, Mapping) or "parts" not in state:
        raise KeyError(f"{where}: missing key 'parts'")
    records = []
    for saved in state["parts"]:
        _check_keys(where, saved, findings)
        record: Record = {}
        for key, value in saved.items():
            if isinstance(value, Mapping) and "format" in value:
                record[key] = _coded(f"{where}[{key!r}]", value, param)
            else:
                record[key] = _own(value, param)
        records.append(record)
    total = sum(map(length, records))
    if len(records) > 1 and total != param.numel():
        raise ValueError(f"{where}: parts of {total} elements, must be {param.numel()}")
    return records


def _coded(where: str, saved: Mapping[str, Any], param: Tensor) -> Coded:
    missing = {"format", "parts", "dtype", "shape", "order", "root"} - saved.keys()
    if missing:
        raise KeyError(f"{where}: missing key {min(missing)!r}")
    shape, order = tuple(saved["shape"]), tuple(saved["order"])
    if shape != tuple(param.shape) and len(shape) != 1:
        raise ValueError(f"{where}: shape {shape}, must be {tuple(param.shape)}")
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
    """A copy that nothing else holds; of tensors with elements, beside the parameter."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    device = param.device if value.dim() else value.device
    return value.detach().to(device, copy=True)


def _check(where: str, state: Any, param: Tensor, findings: Findings) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"{where}: must be a dict, got {type(state).__name__}")
    _check_keys(where, state, findings)
    for key in findings.elementwise & state.keys():
        value = state[key]
        if value is None and key in findings.optional:
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        if shape != tuple(param.shape):
            raise ValueError(f"{where}[{key!r}]: shape {shape}, must be {tuple(param.shape)}")


def _check_keys(where: str, state: Mapping[str, Any], findings: Findings) -> None:
    if not findings.keys:
        return
    if missing := sorted(findings.keys.keys() - state.keys()):
        raise KeyError(f"{where}: missing key {missing[0]!r}")
    known = findings.keys.keys() | findings.optional
    if unknown := sorted(state.keys() - known):
        raise KeyError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


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
            return copy.deepcopy(value)
    if key == "step":
        on_device = group.get("capturable") or group.get("fused")
        return value.to(param.device, torch.float32, copy=True) if on_device else value.clone()
    if not param.is_floating_point() or is_packed:
        return value.detach().to(param.device, copy=True)
    dtype = findings.keys.get(key) or param.dtype
    return value.detach().to(param.device, dtype, copy=True)
