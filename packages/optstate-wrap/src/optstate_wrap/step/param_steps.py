"""Makes the ``ParamStep`` objects with which the codecs' engine steps stored records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.engine import ParamStep
from optstate_codecs.formats import FP32, Format
from optstate_codecs.rules import SGD, Adam, Moment, Rule
from optstate_codecs.writes import parameter_write
from optstate_wrap.state.param_chunks import Layout, ParamChunk
from optstate_wrap.state.record import Coded, OffloadedTensor, Record, stored_tensor

__all__ = [
    "make_param_step",
    "rule_of",
    "same_bits",
    "same_order",
    "stored_formats",
    "update_record",
]


def rule_of(inner: Optimizer) -> Rule | None:
    """The rule of ``optstate_codecs`` that ``inner`` follows in all its groups, or None."""
    groups = inner.param_groups
    if any(group.get("differentiable") for group in groups):
        return None
    if type(inner) is torch.optim.SGD:
        return SGD()
    if type(inner) in (torch.optim.Adam, torch.optim.AdamW):
        usual = type(inner) is torch.optim.AdamW
        kinds = {bool(group.get("decoupled_weight_decay", usual)) for group in groups}
        return Adam(decoupled=kinds.pop()) if len(kinds) == 1 else None
    return None


def same_bits(inner: Optimizer) -> bool:
    """Whether the engine steps exact state to the same bits as ``inner``.

    Some square roots of the GPU kernel, and some sums in torch's fused and capturable steps, differ
    in the last bit.
    """
    groups = inner.param_groups
    rooted = type(inner) is not torch.optim.SGD
    cuda = any(param.is_cuda for group in groups for param in group["params"])
    flagged = any(group.get(flag) for group in groups for flag in ("fused", "capturable"))
    return not flagged and not (rooted and cuda)


def same_order(record: Record, param: Tensor) -> bool:
    """Whether the stored tensors have the memory order of the parameter."""
    now = Layout.of(param)
    for value in record.values():
        if isinstance(value, Coded):
            if (value.shape, value.order) != (now.shape, now.order):
                return False
            continue
        tensor = stored_tensor(value)
        dims = tensor.dim() if isinstance(tensor, Tensor) else 0
        if dims and not tensor.permute(now.order).is_contiguous():
            return False
    return True


def stored_formats(
    record: Record, names: Sequence[str], formats: Mapping[str, Format], counted: bool, exact: bool
) -> dict[str, Format] | None:
    """The stored format of each moment; None if the engine cannot step the record as it is.

    Args:
        record: of a chunk.
        names: of the rule's moments.
        formats: wanted after the step, by state key; they have to be the stored ones.
        counted: whether the record must have a step count.
        exact: whether to step state in which nothing is coded.
    """
    known = {*names, "step"} if counted else set(names)
    coded = any(isinstance(record.get(name), Coded) for name in names)
    if set(record) != known or not (coded or exact):
        return None
    if counted and not (isinstance(record["step"], Tensor) and record["step"].dim() == 0):
        return None
    roots = {value.root for value in record.values() if isinstance(value, Coded)}
    found: dict[str, Format] = {}
    for name in names:
        value, wanted = record[name], formats.get(name)
        if isinstance(value, Coded):
            for_root = wanted is None and name in roots and value.format == FP32()
            if not for_root and (wanted is None or replace(wanted, min_elements=0) != value.format):
                return None
            found[name] = value.format
            continue
        tensor = stored_tensor(value)
        if wanted is not None or not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
            return None
        found[name] = FP32()
    return found


def make_param_step(
    chunk: ParamChunk,
    record: Record,
    moments: tuple[Moment, ...],
    formats: dict[str, Format],
    seed: int,
) -> ParamStep:
    """The ``ParamStep`` of a chunk, over the tensors of its record, stored in ``formats``."""
    param = chunk.data() if chunk.parts > 1 else chunk.param
    # without a stored count, the rule only needs to know that this is not the first step
    state: dict[str, Any] = {"step": record.get("step", None)}
    if state["step"] is None:
        state["step"] = torch.ones((), dtype=torch.float32, device="cpu")
    for name in formats:
        value = record[name]
        state |= (
            _components(name, value) if isinstance(value, Coded) else {name: stored_tensor(value)}
        )
    write = parameter_write("nearest", param.dtype)
    position = (chunk.number, chunk.group, chunk.start)
    return ParamStep(param, state, moments, formats, write, seed, *position)


def _components(name: str, coded: Coded) -> dict[str, Tensor]:
    """The components of a moment with the parameter's shape, as the engine takes them."""
    layout = Layout(coded.shape, coded.order)
    return {
        component.key(name): layout.unflatten(part)
        if component.per_element
        else part.view(component.shape(coded.shape))
        for part, component in zip(coded.parts, coded.bound.components, strict=True)
    }


def update_record(param_step: ParamStep, record: Record) -> None:
    """Set the tensors of the state of a ``ParamStep`` in its record."""
    for name in param_step.formats:
        value = record[name]
        if isinstance(value, Coded):
            flat = [
                param_step.state[c.key(name)].permute(value.order).view(-1)
                if c.per_element
                else param_step.state[c.key(name)].view(-1)
                for c in value.bound.components
            ]
            record[name] = replace(value, parts=tuple(flat))
        elif isinstance(value, OffloadedTensor):
            record[name] = replace(value, tensor=param_step.state[name])
        else:
            record[name] = param_step.state[name]
