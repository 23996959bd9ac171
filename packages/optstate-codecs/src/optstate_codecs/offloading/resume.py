"""Resume an offloaded optimizer from a state file: check its whole manifest, then load it."""

from __future__ import annotations

from collections.abc import Mapping
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
from optstate_codecs.writes import MASTER, parameter_write

if TYPE_CHECKING:
    from optstate_codecs.offloading.disk import DiskStateStore

__all__ = ["resume_from"]


def _like(old: Any, new: Any) -> Any:
    """A value from a manifest in the type of the group's present value."""
    if isinstance(old, Tensor):
        return old.fill_(new)
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
    try:
        groups = _merged(optimizer, manifest["param_groups"], where)
        slabs = []
        for slab in manifest["slabs"]:
            offsets = [slab["offset"], *slab["others"]]
            family = [store.mapped(offset, slab["bytes"]) for offset in offsets]
            slabs.append(Slab(family, family[0]))
        every = [(n, param) for n, group in enumerate(groups) for param in group["params"]]
        states: dict[int, dict[str, Any]] = {}
        for entry in manifest["parameters"]:
            number = entry["number"]
            if not 0 <= number < len(every) or number in states:
                raise ValueError(f"{where}: parameter {number}: of {len(every)}, each once")
            group, param = groups[every[number][0]], every[number][1]
            slab = slabs[entry["slab"]]
            states[number] = _state_in(
                optimizer, group, param, entry, slab, f"{where}: parameter {number}"
            )
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{where}: not a manifest: {error}") from error

    for mine, merged in zip(optimizer.param_groups, groups, strict=True):
        mine.update({key: _like(mine.get(key), merged[key]) for key in merged if key != "params"})
    optimizer.state.clear()
    loaded = []
    for number, state in states.items():
        group, param = every[number]
        optimizer.state[param] = state
        loaded.append((param, state, counts_on_device(optimizer.param_groups[group])))
    share_steps(loaded)
    placement.resume(_by_slab(optimizer, manifest, slabs))


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
