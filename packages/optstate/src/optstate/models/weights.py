"""Reads shapes and dtypes of a model's weights from files, without the weights themselves."""

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from optstate.models.model import Entry, Model

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The floating-point dtypes that parameters have, by safetensors' names."""
SAFETENSORS_HEADER = 100_000_000
"""A longer header is refused, as by safetensors itself."""
INDEX = "*.safetensors.index.json"
WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Entries of a training checkpoint that hold the weights."""
LEFT_OUT = "{} tensors are left out: tied, or no floating point of 16 bits or more"


def read_weights(path: Path, key: str | None = None) -> Model:
    """The parameters in a safetensors file, a folder of them, or a torch checkpoint.

    Args:
        path: the file or folder; with an index, the files that it names.
        key: the entry of a torch checkpoint that holds the weights, with dots between levels.

    Raises:
        ValueError: something cannot be read; the message names the file.
    """
    if path.is_dir():
        files = _files_of_folder(path)
    elif path.suffix == ".safetensors":
        files = [path]
    elif path.name.endswith(".safetensors.index.json"):
        files = _files_of_index(path)
    else:
        return _of_torch_file(path, key)
    if key is not None:
        raise ValueError(f"key={key!r}: only for a torch checkpoint, not for {path}")
    entries: list[Entry] = []
    left_out = 0
    for file in files:
        for name, about in read_safetensors_header(file).items():
            if name == "__metadata__":
                continue
            dtype = SAFETENSORS_DTYPES.get(about["dtype"])
            if dtype is None:
                left_out += 1
            else:
                entries.append(Entry(tuple(about["shape"]), dtype, name=name))
    return _model(path, entries, left_out)


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: for each tensor its dtype, shape and place.

    Raises:
        ValueError: it is not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > SAFETENSORS_HEADER:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
            for name, about in header.items():
                if name != "__metadata__" and not {"dtype", "shape"} <= set(about):
                    raise ValueError(f"{name!r} has no dtype or shape")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (struct.error, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    return dict(header)


def _files_of_folder(folder: Path) -> list[Path]:
    indices = sorted(folder.glob(INDEX))
    if len(indices) > 1:
        names = ", ".join(path.name for path in indices)
        raise ValueError(f"{folder}: {len(indices)} indices, {names}: name one of them")
    files = _files_of_index(indices[0]) if indices else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors in it")
    return files


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors files: {error}") from error
    return [index.parent / name for name in sorted(names)]


def load_torch_file(path: Path, to_meta: bool = False) -> Any:
    """What is in a torch file; nothing in it is executed.

    Args:
        path: the file.
        to_meta: whether tensors come without their data.

    Raises:
        ValueError: it cannot be read, or holds objects that ``weights_only=True`` refuses.
    """
    device = "meta" if to_meta else "cpu"
    try:
        # of a mapped file only what is used is read
        mapped = not to_meta and is_zipfile(path)
        return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: torch.load(weights_only=True) refuses it: {reason}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a torch file: {str(error).splitlines()[0]}") from error


def entry_at(path: Path, content: Any, key: str) -> Any:
    """An entry of nested dicts and lists, with dots between levels.

    Raises:
        ValueError: there is none; the message lists the entries that there are.
    """
    for part in key.split("."):
        index: Any = int(part) if isinstance(content, list) and part.isdigit() else part
        try:
            content = content[index]
        except (KeyError, IndexError, TypeError) as error:
            known = list(content) if isinstance(content, Mapping) else []
            raise ValueError(f"{path}: no entry {key!r}; has {known!r:.200}") from error
    return content


def _of_torch_file(path: Path, key: str | None) -> Model:
    content = load_torch_file(path, to_meta=True)
    weights = _weights_in(content) if key is None else entry_at(path, content, key)
    tensors = _tensors_of(weights)
    entries = parameters_in(path, weights)
    return _model(path, entries, len(tensors) - len(entries))


def parameters_in(path: Path, content: Any) -> tuple[Entry, ...]:
    """The parameters among a checkpoint's weights, tied ones once; none if it has no weights.

    Args:
        path: names the checkpoint.
        content: its weights, or all of it with the weights in one of `WEIGHT_KEYS`.
    """
    found = []
    for name, tensor in _tensors_of(_weights_in(content)).items():
        if tensor.dtype in SAFETENSORS_DTYPES.values():
            found.append((name, tensor.detach().requires_grad_()))
    return Model.of_tensors(str(path), found).entries


def _weights_in(content: Any) -> Any:
    entries = content if isinstance(content, Mapping) else {}
    inner = [entries[key] for key in WEIGHT_KEYS if isinstance(entries.get(key), Mapping)]
    return inner[0] if inner else content


def _tensors_of(weights: Any) -> dict[str, Tensor]:
    entries = weights.items() if isinstance(weights, Mapping) else ()
    return {str(name): value for name, value in entries if isinstance(value, Tensor)}


def _model(path: Path, entries: list[Entry] | tuple[Entry, ...], left_out: int) -> Model:
    if not entries:
        raise ValueError(f"{path}: has no tensors that are parameters; --key names their entry")
    notes = (LEFT_OUT.format(left_out),) if left_out else ()
    return Model(str(path), tuple(entries), notes)
