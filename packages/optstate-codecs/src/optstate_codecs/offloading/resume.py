"""Resume an offloaded optimizer from a state file: check its whole manifest, then load it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optstate_codecs.engine.request import ParamStep
from optstate_codecs.offloading.group_values import UNSAID, Group, plain
from optstate_codecs.offloading.placement import Placement
from optstate_codecs.offloading.slabs import ALIGNMENT, Slab, Starts, own_storage_view
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.state.building import counts_on_device, share_steps
from optstate_codecs.state.groups import merged_groups
from optstate_codecs.state.layout import Declaration, bound, empty_state, storage_order
from optstate_codecs.state.structure import malformed
from optstate_codecs.writes import MASTER, parameter_write

if TYPE_CHECKING:
    from optstate_codecs.offloading.disk import DiskStateStore

__all__ = ["resume_from"]


def _like(old: Any, new: Any) -> Any:
    """A value from a manifest in the type of the group's present value."""
    if isinstance(old, Tensor) and old is not new:
        return torch.full_like(old, new)
    if isinstance(new, list):
        return new if isinstance(old, list) else tuple(new)
    return new


def resume_from(optimizer: CodedOptimizer, placement: Placement, store: DiskStateStore) -> None:
    """Load state, step counts and hyper-parameters from the manifest and the file of a store.

    Args:
        optimizer: has the parameters and formats of the optimizer that wrote the file.
        placement: an empty placement, which gets the parameters of the manifest.
        store: was opened with ``resume``.

    Raises:
        ValueError: the file does not fit the optimizer; nothing has changed.
    """
    manifest = store.manifest
    assert manifest is not None
    where = str(store.manifest_path)
    with malformed(where):
        groups, slabs, states = _read(optimizer, store, manifest, where)

    before = [dict(group) for group in optimizer.param_groups], dict(optimizer.state)
    optimizer.state.clear()
    try:
        tensors = []
        for mine, new in zip(optimizer.param_groups, groups, strict=True):
            for key, value in new.items():
                if isinstance(mine.get(key), Tensor):
                    # the user may hold it, so it gets the new value itself
                    tensors.append((mine[key], value))
                elif key != "params":
                    mine[key] = value
        loaded = []
        for param, state, group in states.values():
            optimizer.state[param] = state
            loaded.append((param, state, counts_on_device(optimizer.param_groups[group])))
        share_steps(loaded)
        placement.resume(_by_slab(optimizer, manifest, slabs))
        for old, value in tensors:
            old.copy_(value)
    except BaseException:
        for mine, values in zip(optimizer.param_groups, before[0], strict=True):
            mine.clear()
            mine.update(values)
        optimizer.state.clear()
        optimizer.state.update(before[1])
        raise


def _read(
    optimizer: CodedOptimizer, store: DiskStateStore, manifest: dict[str, Any], where: str
) -> tuple[list[Group], list[Slab], dict[int, tuple[Tensor, dict[str, Any], int]]]:
    """The groups and slabs of a manifest, and by parameter number: it, its state, its group."""
    try:
        groups = _merged(optimizer, manifest["param_groups"], where)
        slabs = []
        for slab in manifest["slabs"]:
            offsets = [slab["offset"], *slab["others"]]
            family = [store.mapped(offset, slab["bytes"]) for offset in offsets]
            slabs.append(Slab(family, family[0]))
        every = [(n, param) for n, group in enumerate(groups) for param in group["params"]]
        states: dict[int, tuple[Tensor, dict[str, Any], int]] = {}
        used: dict[int, list[tuple[int, int, str]]] = {}
        for entry in manifest["parameters"]:
            number = entry["number"]
            if not 0 <= number < len(every) or number in states:
                raise ValueError(f"{where}: parameter {number}: of {len(every)}, each once")
            group, param = every[number]
            name, slab = f"{where}: parameter {number}", slabs[entry["slab"]]
            state = _state_in(optimizer, groups[group], param, entry, slab, name)
            states[number] = param, state, group
            used.setdefault(entry["slab"], []).extend(
                (start, start + state[key].nbytes, f"{name}: {key}")
                for key, start in entry["starts"].items()
                if state[key].nbytes
            )
        for regions in used.values():
            for (_, end, first), (start, _, second) in pairwise(sorted(regions)):
                if start < end:
                    raise ValueError(f"{second} at byte {start} shares bytes with {first}")
        merged = zip(optimizer.param_groups, groups, strict=True)
        groups = [{k: _like(mine.get(k), v) for k, v in new.items()} for mine, new in merged]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{where}: not a manifest: {error}") from error
    return groups, slabs, states


def _merged(optimizer: CodedOptimizer, saved: list[Group], where: str) -> list[Group]:
    """The optimizer's groups with the values of the manifest."""

    def check(new: Group, values: Mapping[str, Any]) -> None:
        try:
            optimizer.check_group(new)
        except TypeError as error:
            raise ValueError(str(error)) from error
        mine = plain(new)
        for key in optimizer.storage_options:
            if key in values and values[key] != mine.get(key):
                raise ValueError(f"{key}={values[key]}, must be {mine.get(key)}")

    return merged_groups(
        f"{where}: param_groups",
        optimizer.param_groups,
        saved,
        keep={*UNSAID, *optimizer.storage_options},
        convert=lambda key, value: tuple(value) if isinstance(value, list) else value,
        check=check,
    )


def _state_in(
    optimizer: CodedOptimizer,
    group: Group,
    param: Tensor,
    entry: dict[str, Any],
    slab: Slab,
    name: str,
) -> dict[str, Any]:
    """A parameter's state as views of its slab."""
    if list(param.shape) != entry["shape"]:
        raise ValueError(f"{name}: shape {tuple(entry['shape'])}, must be {tuple(param.shape)}")
    if list(storage_order(param)) != entry["order"]:
        raise ValueError(
            f"{name}: dimensions lie in the order {entry['order']}, from the slowest, must be "
            f"{list(storage_order(param))}"
        )
    write = parameter_write(optimizer.write, param.dtype)
    formats = bound(optimizer.group_formats(group), param)
    declared: dict[str, Declaration] = {**formats, MASTER: write}
    parts = {c.key(n): c for n, d in declared.items() for c in d.components}
    if set(parts) != set(entry["starts"]):
        raise ValueError(
            f"{name}: stored as {', '.join(entry['starts'])}, must be {', '.join(parts)}"
        )
    memory = slab.memory.tensor
    step = torch.tensor(float(entry["step"]), dtype=torch.float32, device="cpu")
    state: dict[str, Any] = {"step": step}
    for key, component in parts.items():
        like = empty_state(param, component, torch.device("meta"))
        start = entry["starts"][key]
        if start < 0 or start % ALIGNMENT or start + like.nbytes > memory.numel():
            raise ValueError(f"{name}: {key} at byte {start} does not fit into its slab")
        state[key] = own_storage_view(memory, start, like)
    return state


def _by_slab(
    optimizer: CodedOptimizer,
    manifest: dict[str, Any],
    slabs: list[Slab],
) -> list[tuple[Slab, list[ParamStep], list[Starts], bool]]:
    """Each slab with its parameters, where their components begin, and whether they are cut."""
    param_steps = {param_step.index: param_step for param_step in optimizer.stored_param_steps()}
    members: dict[int, list[dict[str, Any]]] = {}
    for entry in manifest["parameters"]:
        members.setdefault(entry["slab"], []).append(entry)
    return [
        (
            slabs[number],
            [param_steps[entry["number"]] for entry in entries],
            [entry["starts"] for entry in entries],
            entries[-1]["parts"] > 1,
        )
        for number, entries in sorted(members.items())
    ]
