"""Packed optimizer state in a safetensors file: nothing pickled, readable by other tools.

Tensors are named ``state.<parameter>.<key>``, with the parameter's name where all parameters have
one, or else its number. The header's metadata has the rest of the state dict as JSON, under
``optstate``: the groups with their hyper-parameters, formats and names, the shape of each
parameter, which tensor is which entry, and the version of the package that wrote it. safetensors
stores contiguous tensors only; the order of dimensions that blocks follow is an entry of the state
(``dim_order``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from optstate_codecs.files import parse_json, replacement
from optstate_codecs.json_values import JsonReader, JsonWriter, is_pair
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.sharding import is_distributed

__all__ = ["SavedState", "load_safetensors", "read_safetensors", "save_safetensors"]

#: of the entry in the header; a file of another version is refused
FORMAT_VERSION = 1
ENTRY = "optstate"
# what the entry must hold, and of which type
FIELDS: dict[str, type] = {
    "format_version": int,
    "optimizer": str,
    "state": list,
    "param_groups": list,
    "shapes": list,
}
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class SavedState:
    """The content of a file of ``save_safetensors``.

    Attributes:
        optimizer: the name of the class that was saved.
        package: the name and version of the package that wrote it.
        shapes: of the parameters, in order.
        state_dict: the packed state dict.
    """

    optimizer: str
    package: str
    shapes: list[list[int]]
    state_dict: dict[str, Any]


def save_safetensors(optimizer: CodedOptimizer, path: PathLike) -> None:
    """Save the packed state of an optimizer as a safetensors file.

    The file is written beside ``path`` and renamed when it is complete, so that ``path`` is the old
    file or the whole new one.

    Args:
        optimizer: any optimizer of the family.
        path: of the file, which is replaced if it exists.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: the optimizer is of another library, has DTensors, or a value in its groups or
            state cannot be written as JSON; the message names it.
        OSError: the file cannot be written.

    Examples:
        >>> save_safetensors(optimizer, "optimizer.safetensors")
    """
    library = _library()
    _check(optimizer, "saved")
    saved = optimizer.state_dict()
    writer = JsonWriter(saved["param_groups"])
    header = {
        "format_version": FORMAT_VERSION,
        "package": f"optstate-codecs {_package_version()}",
        "optimizer": type(optimizer).__name__,
        "shapes": [list(p.shape) for group in optimizer.param_groups for p in group["params"]],
        "param_groups": [
            writer.encoded(f"param_groups.{number}", group)
            for number, group in enumerate(saved["param_groups"])
        ],
        "state": [
            [key, writer.encoded(f"state.{writer.label(key)}", value)]
            for key, value in saved["state"].items()
        ],
    }
    metadata = {"format": "pt", ENTRY: json.dumps(header)}
    try:
        with replacement(Path(path), f".{os.getpid()}.new", sync=True) as new:
            library.torch.save_file(writer.tensors, new, metadata=metadata)
    except library.SafetensorError as error:
        raise OSError(f"{os.fspath(path)}: cannot be written: {error}") from error


def load_safetensors(optimizer: CodedOptimizer, path: PathLike) -> None:
    """Load the packed state that ``save_safetensors`` has saved, as ``load_state_dict`` does.

    Names of parameters, if file and optimizer have them, and shapes must be those of the file.

    Args:
        optimizer: any optimizer with the moments of the one that was saved; its formats may differ.
        path: of the file.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such file.
        TypeError: the optimizer is of another library, or has DTensors.
        ValueError, KeyError: the file is truncated, of another program or version, or does not fit
            the optimizer; the message says where, and nothing has changed.

    Examples:
        >>> load_safetensors(optimizer, "optimizer.safetensors")
    """
    _library()
    _check(optimizer, "loaded")
    saved = read_safetensors(path)
    where, groups = os.fspath(path), saved.state_dict["param_groups"]
    _check_params(where, optimizer, groups, saved.shapes)
    try:
        optimizer.load_state_dict(saved.state_dict)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        text = error.args[0] if error.args else error
        kind = KeyError if isinstance(error, KeyError) else ValueError
        raise kind(f"{where}: {text}") from error


def read_safetensors(path: PathLike) -> SavedState:
    """What ``save_safetensors`` has saved, with its tensors on the CPU.

    Args:
        path: of the file.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such file.
        ValueError, KeyError: the file is truncated, or of another program or version; the message
            says where.

    Example:
        >>> read_safetensors("optimizer.safetensors").optimizer
        'AdamW8bit'
    """
    library = _library()
    where = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: no such file")
    try:
        with library.safe_open(where, framework="pt", device="cpu") as file:
            header = _header(where, file.metadata())
            reader = JsonReader(where, file)
            groups = [
                reader.decoded(f"param_groups[{number}]", group)
                for number, group in enumerate(header["param_groups"])
            ]
            state = dict(_entries(where, header["state"], reader))
            reader.check_all_read()
    except library.SafetensorError as error:
        raise ValueError(f"{where}: truncated, or no safetensors file: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: header: nested too deep") from error
    _check_groups(where, groups)
    return SavedState(
        header["optimizer"],
        str(header.get("package", "")),
        header["shapes"],
        {"state": state, "param_groups": groups},
    )


def _library() -> Any:
    try:
        library = import_module("safetensors")
        import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "safetensors: not installed; install it, or optstate-codecs with its extra: "
            "pip install 'optstate-codecs[safetensors]'"
        ) from error
    return library


def _package_version() -> str:
    version: str = import_module("optstate_codecs").__version__
    return version


def _check(optimizer: Any, done: str) -> None:
    if not isinstance(optimizer, CodedOptimizer):
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: must be an optimizer of the family; save the "
            "state dict of another with torch.save"
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in enumerate(params):
        if is_distributed(param):
            raise TypeError(
                f"parameter {number}: is a DTensor, whose state cannot be {done} as safetensors; "
                "use torch.distributed.checkpoint, which saves each worker's shards"
            )


def _entries(where: str, entries: list[Any], reader: JsonReader) -> Iterator[tuple[Any, Any]]:
    """The entries of ``state``."""
    seen = set()
    for entry in entries:
        if not is_pair(entry) or entry[0] in seen:
            raise ValueError(f"{where}: header: state: {entry!r:.80}: not an entry, or there twice")
        seen.add(entry[0])
        yield entry[0], reader.decoded(f"state[{entry[0]!r}]", entry[1])


def _header(where: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The entry of the header, with the type of each field checked."""
    if not metadata or ENTRY not in metadata:
        raise ValueError(
            f"{where}: not written by save_safetensors: its header has no entry {ENTRY!r}"
        )
    try:
        header = parse_json(metadata[ENTRY])
    except ValueError as error:
        raise ValueError(f"{where}: header: not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{where}: header: {header!r:.80}: must be a table")
    version, package = header.get("format_version"), header.get("package", "another program")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version={version!r}: must be {FORMAT_VERSION}; written by {package}"
        )
    for key, kind in FIELDS.items():
        if key not in header:
            raise KeyError(f"{where}: header: missing key {key!r}")
        if not isinstance(header[key], kind):
            got = f"{header[key]!r:.80}"
            raise ValueError(f"{where}: header: {key}={got}: must be a {kind.__name__}")
    return header


def _check_groups(where: str, groups: list[Any]) -> None:
    """Raise unless each group is a dict with a list of parameters."""
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ValueError(
                f"{where}: header: param_groups[{number}]: must be a dict with a list of params"
            )
        if not all(isinstance(param, (int, str)) for param in group["params"]):
            raise ValueError(f"{where}: header: param_groups[{number}]: params must be numbers")


def _check_params(
    where: str, optimizer: CodedOptimizer, groups: list[dict[str, Any]], shapes: list[Any]
) -> None:
    """Raise unless names and shapes of the parameters are those of the optimizer's."""
    counts = [len(group["params"]) for group in groups]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if counts != expected or len(shapes) != sum(counts):
        raise ValueError(
            f"{where}: param_groups: {counts} parameters with {len(shapes)} shapes, must be "
            f"{expected}"
        )
    index = 0
    for number, (mine, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        names, theirs = mine.get("param_names"), saved.get("param_names")
        if names and theirs and list(names) != list(theirs):
            wrong = [pair for pair in zip(theirs, names, strict=False) if pair[0] != pair[1]]
            got, must = wrong[0] if wrong else (theirs, names)
            raise ValueError(
                f"{where}: param_groups[{number}]: parameter {got!r} in the place of {must!r}"
            )
        for param in mine["params"]:
            if list(param.shape) != shapes[index]:
                raise ValueError(
                    f"{where}: parameter {index}: shape {shapes[index]}, must be "
                    f"{list(param.shape)}"
                )
            index += 1
