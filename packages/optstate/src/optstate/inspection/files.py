"""Reads optimizer state from a disk store's manifest and from a distributed checkpoint."""

import pickle
from importlib import import_module
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from optstate.checkpoints import load_checkpoint
from optstate.inspection.state import (
    Contents,
    ParamState,
    Part,
    dtype_name,
    of_checkpoint,
    plain_group,
)
from optstate_codecs.offloading.manifest import manifest_path, read_manifest

METADATA = ".metadata"
"""The file of a distributed checkpoint that says what is in the others."""
STATE = ".state."
ALLOWED = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": None,
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}
"""What a distributed checkpoint's metadata may name: by module, names; None: those of `_safe`."""


def read_contents(path: Path, key: str | None = None) -> Contents:
    """The optimizer state in a file or folder; nothing in it is executed.

    Args:
        path: a torch file, a file of ``save_safetensors``, the file of a disk store or its
            manifest, or the folder of a distributed checkpoint.
        key: the entry of a torch file with the state dict; or the prefix of a distributed
            checkpoint's names.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if path.is_dir():
        if not (path / METADATA).is_file():
            raise ValueError(f"{path}: no distributed checkpoint, whose folder has {METADATA}")
        return of_metadata(path, key)
    if path.suffix == ".json" or manifest_path(path).is_file():
        if key is not None:
            raise ValueError(f"key={key!r}: not for a disk store, {path}")
        return of_manifest(path if path.suffix == ".json" else manifest_path(path))
    return of_checkpoint(load_checkpoint(path, key))


def of_manifest(path: Path) -> Contents:
    """The state that the manifest of a disk store describes.

    Raises:
        ValueError: it is no manifest.
    """
    try:
        manifest = read_manifest(path)
    except OSError as error:
        raise ValueError(str(error)) from error
    counts = [int(group["params"]) for group in manifest["param_groups"]]
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    # where each component begins in its slab, and where the slab ends
    begins: dict[int, list[int]] = {n: [s["bytes"]] for n, s in enumerate(manifest["slabs"])}
    for entry in manifest["parameters"]:
        begins[entry["slab"]] += entry["starts"].values()
    sizes = {
        slab: {begin: end - begin for begin, end in pairwise(sorted(marks))}
        for slab, marks in begins.items()
    }
    params = tuple(
        ParamState(
            str(entry["number"]),
            sum(entry["number"] >= end for end in ends),
            tuple(Part(k, sizes[entry["slab"]][at]) for k, at in entry["starts"].items()),
            tuple(entry["shape"]),
            entry["step"],
        )
        for entry in manifest["parameters"]
    )
    groups = tuple(plain_group(group) for group in manifest["param_groups"])
    return Contents("disk store", "optstate", params, groups)


def of_metadata(folder: Path, prefix: str | None = None) -> Contents:
    """The optimizer state that a distributed checkpoint has, from its metadata alone.

    Step counts and the groups' values are in other files, which are not read.

    Raises:
        ValueError: the metadata is none, or names things that such metadata does not have.
    """
    entries = _metadata(folder / METADATA).state_dict_metadata
    parts: dict[str, list[Part]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    known = _shapes(entries)
    for name, about in entries.items():
        head, _, rest = name.partition(STATE)
        if not rest or not hasattr(about, "size") or (prefix is not None and head != prefix):
            continue
        param, _, key = rest.rpartition(".")
        found = parts.setdefault(param, [])
        if key == "step":
            continue
        shape, dtype = tuple(about.size), about.properties.dtype
        found.append(Part(key, prod(shape) * dtype.itemsize, dtype_name(dtype)))
        if param in known:
            shapes[param] = known[param]
    if not parts:
        heads = sorted({name.partition(STATE)[0] for name in entries if STATE in name})
        where = f"under {prefix!r}; has {heads}" if prefix is not None else "in it"
        raise ValueError(f"{folder}: no optimizer state {where}")
    params = tuple(
        ParamState(param, None, tuple(found), shapes.get(param)) for param, found in parts.items()
    )
    coded = any(part.key.endswith("_codes") for param in params for part in param.parts)
    return Contents("distributed checkpoint", "optstate" if coded else "torch", params)


def _shapes(entries: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights, by their names with and without the first level."""
    found: dict[str, tuple[int, ...]] = {}
    for name, about in entries.items():
        if hasattr(about, "size") and STATE not in name:
            shape = tuple(about.size)
            found |= {name.partition(".")[2]: shape, name: shape}
    return found


def _metadata(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a file that is no pickle raises almost anything
        raise ValueError(f"{path}: no metadata of a distributed checkpoint: {error}") from error
    if not hasattr(found, "state_dict_metadata"):
        raise ValueError(f"{path}: no metadata of a distributed checkpoint")
    return found


class _Unpickler(pickle.Unpickler):
    """Loads what metadata consists of, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = ALLOWED.get(module, ())
        found: Any = None
        if allowed is None or name in allowed:
            found = getattr(import_module(module), name, None)
        if found is None or not (allowed or _safe(found)):
            raise pickle.UnpicklingError(f"{module}.{name} is refused")
        return found


def _safe(found: Any) -> bool:
    """Whether something of torch only describes tensors: a dtype, a size, a data class."""
    import torch

    described = (torch.dtype, torch.layout, torch.memory_format)
    own = getattr(found, "__module__", "") == "torch.distributed.checkpoint.metadata"
    return isinstance(found, described) or found is torch.Size or (own and isinstance(found, type))
