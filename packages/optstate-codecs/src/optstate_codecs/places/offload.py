"""Keeping the state of an optimizer of the family elsewhere than on the device that steps it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from optstate_codecs import checks
from optstate_codecs.layout import Declaration, bound, empty_state
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.places.base import HostPlace, Place
from optstate_codecs.places.slabs import Memory, Slab, laid
from optstate_codecs.places.stream import CHUNK_BYTES, Stream
from optstate_codecs.writes import MASTER, parameter_write

__all__ = ["STORES", "Offload", "make_place", "offload"]

STORES = ("host", "disk")


@dataclass(frozen=True)
class Offload:
    """How an optimizer's state is kept elsewhere; the arguments of ``offload``."""

    store: str = "host"
    path: str | None = None
    sync: bool = False
    chunk_bytes: int = CHUNK_BYTES
    resident_bytes: int = 0

    def again(self, optimizer: CodedOptimizer) -> None:
        """Have a copy of an optimizer keep its state as the first does; a file is not shared."""
        optimizer.offloaded = how = replace(self, store="host", path=None)
        optimizer._session = how.stream(optimizer, HostPlace())

    def stream(self, optimizer: CodedOptimizer, place: Place) -> Stream:
        """A session that keeps the optimizer's state in ``place``."""
        stream = Stream(optimizer.backend, place, self.chunk_bytes, self.resident_bytes)
        return stream


def offload(
    optimizer: CodedOptimizer,
    store: str = "host",
    *,
    path: str | Path | None = None,
    resume: bool = False,
    sync: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    resident_bytes: int = 0,
) -> CodedOptimizer:
    """Keep an optimizer's state in host memory or in a file; steps stay on the parameters' device.

    A step brings the state to the device chunk by chunk, three at a time, while others go back, and
    gives the very bits that it would give with the state beside the parameters. It returns before
    all is back: ``optimizer.state`` waits for that. On a GPU the host's memory is page-locked.

    Args:
        optimizer: of the family; what state it has moves. It is changed in place.
        store: "host", or "disk".
        path: of the file that "disk" keeps state in, twice its size; ``PATH.json`` beside it is the
            manifest of the last whole step, which makes the two a checkpoint of the optimizer.
        resume: take state, step counts and hyper-parameters from the file, which is there.
        sync: have each step reach the disk before its manifest does, as a loss of power demands.
        chunk_bytes: of state that moves at a time; three times as much is taken on the device.
        resident_bytes: of state that stays on the device, the first parameters', not with "disk".

    Returns:
        ``optimizer``.

    Raises:
        TypeError, ValueError, OSError: an argument is wrong, or the file is not usable; the
            optimizer is as it was.

    Example:
        >>> optimizer = offload(AdamW8bit(model.parameters(), lr=2e-5))
    """
    given: Any = optimizer
    if not isinstance(given, CodedOptimizer):
        raise TypeError(
            f"optimizer: {type(given).__name__}, must be an optimizer of the family; "
            "optstate_wrap.OffloadOptimizer takes any other"
        )
    checks.one_of("store", store, STORES)
    checks.flag("resume", resume)
    checks.flag("sync", sync)
    checks.whole_number("chunk_bytes", chunk_bytes)
    checks.whole_number("resident_bytes", resident_bytes)
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes!r}: must be at least 1")
    if (store == "disk") != (path is not None):
        raise ValueError(f"path={path!r}: must be given with store='disk', and only with it")
    if store == "disk" and resident_bytes:
        raise ValueError(
            f"resident_bytes={resident_bytes!r}: must be 0 with store='disk', whose file holds all"
        )
    if (resume or sync) and store != "disk":
        raise ValueError("resume, sync: only with store='disk'")
    if optimizer.offloaded is not None:
        raise ValueError(f"optimizer: its state is offloaded already ({optimizer.offloaded.store})")
    how = Offload(store, None if path is None else str(path), sync, chunk_bytes, resident_bytes)
    place = make_place(store, path, resume, sync)
    if resume:
        _resume(optimizer, how, place)
        return optimizer
    for state in optimizer.state.values():
        for key, value in state.items():
            if key != "step":
                state[key] = value.to("cpu")
    _begin(optimizer, how, place)
    return optimizer


def make_place(
    store: str, path: str | Path | None = None, resume: bool = False, sync: bool = False
) -> Place:
    """The place of that name."""
    if store == "host":
        return HostPlace()
    assert path is not None
    # locks and positional reads are not on every system, and only this wants them
    from optstate_codecs.places.disk import DiskPlace

    return DiskPlace(path, resume, sync)


def _begin(optimizer: CodedOptimizer, how: Offload, place: Place) -> Stream:
    stream = how.stream(optimizer, place)
    # no reference to the optimizer, which has the stream
    groups = optimizer.param_groups
    stream.about = lambda: {"param_groups": [_plain(group) for group in groups]}
    optimizer.offloaded = how
    optimizer._session = stream
    return stream


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """A group's values as JSON has them."""
    return {
        key: value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key != "params"
    }


def _resume(optimizer: CodedOptimizer, how: Offload, place: Any) -> None:
    """Have the optimizer go on from what the place's manifest names."""
    manifest, where = place.manifest, str(place.manifest_path)
    how = replace(how, chunk_bytes=manifest["chunk_bytes"])
    saved = manifest["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"{where}: {len(saved)} param groups, must be {len(optimizer.param_groups)}"
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [n for n, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    slabs = []
    for slab in manifest["slabs"]:
        offsets = [slab["offset"], *slab["others"]]
        family = [place.mapped(offset, slab["bytes"]) for offset in offsets]
        slabs.append(Slab(family, family[0]))
    states = {}
    for entry in manifest["parameters"]:
        number = entry["number"]
        name = f"{where}: parameter {number}"
        if number >= len(params):
            raise ValueError(f"{name}: the optimizer has {len(params)} parameters")
        param = params[number]
        if list(param.shape) != entry["shape"]:
            raise ValueError(f"{name}: shape {tuple(entry['shape'])}, must be {tuple(param.shape)}")
        states[number] = _shown(optimizer, groups[number], param, entry, slabs, name)
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        formats = {key: values.get(key) for key in optimizer.storage_options if key in values}
        mine = {key: _plain(group).get(key) for key in formats}
        if json_like(formats) != json_like(mine):
            raise ValueError(f"{where}: state is stored as {formats}, must be {mine}")
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        for key, value in values.items():
            if key in group and key not in optimizer.storage_options:
                group[key] = _like(group[key], value)
    optimizer.state.clear()
    for number, state in states.items():
        optimizer.state[params[number]] = state
    stream = _begin(optimizer, how, place)
    stream.resume(_by_slab(optimizer, manifest, slabs, params, groups))


def json_like(value: Any) -> Any:
    """With lists for tuples."""
    if isinstance(value, dict):
        return {key: json_like(item) for key, item in value.items()}
    return [json_like(v) for v in value] if isinstance(value, (list, tuple)) else value


def _like(old: Any, new: Any) -> Any:
    """A value of a manifest in the type that the group has it in."""
    if isinstance(old, torch.Tensor):
        return old.fill_(new)
    return tuple(new) if isinstance(new, list) else new


def _shown(
    optimizer: CodedOptimizer,
    group: int,
    param: torch.Tensor,
    entry: dict[str, Any],
    slabs: list[Slab],
    name: str,
) -> dict[str, Any]:
    """A parameter's state as tensors in its slab."""
    formats = bound(optimizer.group_formats(optimizer.param_groups[group]), param)
    write = parameter_write(optimizer.write, param.dtype)
    declared: dict[str, Declaration] = {**formats, MASTER: write}
    parts = {c.key(n): c for n, d in declared.items() for c in d.components}
    if set(parts) != set(entry["starts"]):
        raise ValueError(
            f"{name}: stored as {', '.join(entry['starts'])}, must be {', '.join(parts)}"
        )
    memory: Memory = slabs[entry["slab"]].memory
    state: dict[str, Any] = {"step": torch.tensor(float(entry["step"]))}
    for key, component in parts.items():
        like = empty_state(param, component, torch.device("meta"))
        start = entry["starts"][key]
        if start + like.nbytes > memory.tensor.numel():
            raise ValueError(f"{name}: {key} does not fit into its slab")
        state[key] = laid(memory.tensor, start, like)
    return state


def _by_slab(
    optimizer: CodedOptimizer,
    manifest: dict[str, Any],
    slabs: list[Slab],
    params: list[torch.Tensor],
    groups: list[int],
) -> list[tuple[Slab, list[Any], bool]]:
    """Each slab with the units of its parameters, and whether these are in parts."""
    hypers = [optimizer.rule.hyper(group) for group in optimizer.param_groups]
    kept = [optimizer._kept(number, hyper) for number, hyper in enumerate(hypers)]
    entries = manifest["parameters"]
    places = [
        (e["number"], groups[e["number"]], params[e["number"]], params[e["number"]], 0)
        for e in entries
    ]
    units = optimizer._current_units(places, kept)
    members: list[list[Any]] = [[] for _ in slabs]
    cut = [False] * len(slabs)
    for entry, unit in zip(entries, units, strict=True):
        members[entry["slab"]].append(unit)
        cut[entry["slab"]] = entry["parts"] > 1
    return list(zip(slabs, members, cut, strict=True))
