"""The JSON manifest beside a state file: its content after a complete step, reading and writing."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.counts import LAST_STEP as LAST
from optstate_codecs.files import parse_json, read_text, replacement
from optstate_codecs.offloading.mapped import GRANULARITY
from optstate_codecs.offloading.placement import Placement
from optstate_codecs.state.layout import storage_order

__all__ = ["HEADER", "VERSION", "describe", "manifest_path", "read_manifest", "write_manifest"]

VERSION = 1
#: bytes at the beginning of a state file, which hold the id that its manifest must have
HEADER = 4096
# bytes of a manifest that is read; one of a million parameters has less
LIMIT = 1 << 28
ID = re.compile("[0-9a-f]{32}")
# keys that must be there, and their types
KEYS: dict[str, type] = {
    "id": str,
    "bytes": int,
    "slabs": list,
    "parameters": list,
    "param_groups": list,
    "chunk_bytes": int,
}
SLAB: dict[str, type] = {"bytes": int, "offset": int, "others": list}
PARAMETER: dict[str, type] = {
    "number": int,
    "shape": list,
    "order": list,
    "slab": int,
    "parts": int,
    "starts": dict,
    "step": float,
}


def manifest_path(path: Path) -> Path:
    """The path of a state file's manifest."""
    return path.with_name(path.name + ".json")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is a link, a folder, a pipe or a device.
        ValueError: it is not a manifest, or has another version.
    """
    try:
        manifest = parse_json(read_text(path, LIMIT))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: missing; no step was completed, so there is nothing to resume from"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: not a manifest: {error}") from error
    if isinstance(manifest, dict) and manifest.get("version", VERSION) != VERSION:
        raise ValueError(f"{path}: version {manifest['version']!r:.40}, must be {VERSION}")
    _check(path, "", manifest, {"version": int, **KEYS})
    for name, keys in (("slabs", SLAB), ("parameters", PARAMETER), ("param_groups", {})):
        for number, entry in enumerate(manifest[name]):
            _check(path, f"{name}[{number}]: ", entry, keys)
    for where, wrong in _faults(manifest):
        raise ValueError(f"{path}: not a manifest: {where}: {wrong}")
    return dict(manifest)


def _faults(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each value that has the right type and is wrong: where it is, and what it must be."""
    if not ID.fullmatch(manifest["id"]):
        # so that no other file of the user begins with it
        yield "id", f"{manifest['id']!r:.40}, must be 32 hexadecimal digits"
    size = manifest["bytes"]
    if size < HEADER or size % GRANULARITY:
        yield "bytes", f"{size}, must be a multiple of {GRANULARITY} and at least {HEADER}"
    if not 1 <= manifest["chunk_bytes"] < 2**63:
        yield "chunk_bytes", f"{manifest['chunk_bytes']}, must be from 1 to 2**63 - 1"
    yield from _region_faults(manifest)
    members = Counter(entry["slab"] for entry in manifest["parameters"])
    for number, entry in enumerate(manifest["parameters"]):
        where, slab = f"parameters[{number}]", entry["slab"]
        if not 0 <= slab < len(manifest["slabs"]):
            yield where, f"slab {slab}, of {len(manifest['slabs'])}"
        if not (0 <= entry["step"] <= LAST and entry["step"] == int(entry["step"])):
            yield where, f"step {entry['step']!r}, must be a whole number of at least 0"
        if entry["parts"] != 1 and not (entry["parts"] > 1 == members[slab]):
            yield where, f"parts {entry['parts']}, must be 1, or more if alone in its slab"
        for key, start in entry["starts"].items():
            if type(start) is not int:
                yield where, f"starts: {key!r:.40}: {start!r:.40}, must be a whole number"


def _region_faults(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Regions of slabs that share bytes with each other or with the file's header."""
    regions = [(0, HEADER, "the header")]
    for number, slab in enumerate(manifest["slabs"]):
        for offset in (slab["offset"], *slab["others"]):
            if type(offset) is not int:
                yield f"slabs[{number}]", f"others: {offset!r:.40}, must be a whole number"
                return
            if slab["bytes"]:
                regions.append((offset, offset + slab["bytes"], f"slabs[{number}]"))
    regions.sort()
    for (_, end, first), (start, _, second) in pairwise(regions):
        if start < end:
            yield second, f"byte {start} is in {first} too"


def _check(path: Path, where: str, found: Any, keys: dict[str, type]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a manifest: {where}{found!r:.40}, must be an object")
    for key, kind in keys.items():
        # exactly, since True is an int too
        if type(found.get(key)) is not kind:
            got = f"{found[key]!r:.40}" if key in found else "missing"
            raise ValueError(f"{path}: not a manifest: {where}{key}: {got}, must be {_NAMES[kind]}")


_NAMES = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "a table"}


def write_manifest(path: Path, content: dict[str, Any], sync: bool) -> None:
    """Replace the manifest atomically; with ``sync`` it is on the disk when this returns."""
    with replacement(path, ".new", sync) as new:
        new.write_text(json.dumps({"version": VERSION, **content}))
    if sync:
        # the renaming too: memory that the previous manifest names is overwritten next
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def describe(placement: Placement) -> dict[str, Any]:
    """The content of a manifest, as ``DiskStateStore.commit`` takes it.

    Besides the manifest's own keys there are ``memories``, which hold the slabs, and ``counts``,
    a function that returns the parameters' step counts.
    """
    slabs = placement.slabs
    numbers = {id(slab): number for number, slab in enumerate(slabs)}
    entries = [entry for entry in placement.entries if entry.slab is not None]
    return {
        "chunk_bytes": placement.chunk_bytes,
        "memories": [slab.memory for slab in slabs],
        "counts": _counts([entry.param_step.state["step"] for entry in entries]),
        "slabs": [
            {"bytes": slab.nbytes, "offset": slab.memory.offset}
            | {"others": [m.offset for m in slab.family if m is not slab.memory]}
            for slab in slabs
        ],
        "parameters": [
            {
                "number": entry.param_step.index,
                "shape": list(entry.param_step.param.shape),
                "order": list(storage_order(entry.param_step.param)),
                "slab": numbers[id(entry.slab)],
                "parts": len(entry.parts),
                "starts": entry.starts,
            }
            for entry in entries
        ],
    }


def _counts(steps: Sequence[Tensor]) -> Callable[[], list[float]]:
    """A function that returns the present step counts; only its call waits for a device."""
    if all(step.device.type == "cpu" for step in steps):
        values = [float(step) for step in steps]
        return lambda: values
    together = torch.stack([step.to(steps[0].device) for step in steps])
    copy = together.to("cpu", non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(together.device))

    def read() -> list[float]:
        event.synchronize()
        values: list[float] = copy.tolist()
        return values

    return read
