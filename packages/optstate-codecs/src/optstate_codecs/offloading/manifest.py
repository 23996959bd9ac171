"""The JSON manifest beside a state file: its content after a complete step, reading and writing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.offloading.placement import Placement
from optstate_codecs.state.layout import storage_order

__all__ = ["VERSION", "describe", "manifest_path", "read_manifest", "write_manifest"]

VERSION = 1
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
        ValueError: it is not a manifest, or has another version.
    """
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: missing; no step was completed, so there is nothing to resume from"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: not a manifest: {error}") from error
    if isinstance(manifest, dict) and manifest.get("version", VERSION) != VERSION:
        raise ValueError(f"{path}: version {manifest['version']!r}, must be {VERSION}")
    _check(path, "", manifest, {"version": int, **KEYS})
    for name, keys in (("slabs", SLAB), ("parameters", PARAMETER), ("param_groups", {})):
        for number, entry in enumerate(manifest[name]):
            _check(path, f"{name}[{number}]: ", entry, keys)
    for number, entry in enumerate(manifest["parameters"]):
        if not 0 <= entry["slab"] < len(manifest["slabs"]):
            raise ValueError(
                f"{path}: not a manifest: parameters[{number}]: slab {entry['slab']}, of "
                f"{len(manifest['slabs'])}"
            )
    return dict(manifest)


def _check(path: Path, where: str, found: Any, keys: dict[str, type]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a manifest: {where}{found!r:.40}, must be an object")
    for key, kind in keys.items():
        if not isinstance(found.get(key), kind):
            got = f"{found[key]!r:.40}" if key in found else "missing"
            raise ValueError(f"{path}: not a manifest: {where}{key}: {got}, must be {_NAMES[kind]}")


_NAMES = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "a table"}


def write_manifest(path: Path, content: dict[str, Any], sync: bool) -> None:
    """Replace the manifest atomically; with ``sync`` it is on the disk when this returns."""
    scratch = path.with_name(path.name + ".new")
    with scratch.open("w") as file:
        json.dump({"version": VERSION, **content}, file)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    scratch.replace(path)
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
