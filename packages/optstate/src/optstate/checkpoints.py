"""Finds the state of an optimizer in a file, and which library wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from optstate.models.weights import entry_at, load_torch_file
from optstate_codecs.state_file import read_safetensors

KEYS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states.0")
"""Entries of training checkpoints that hold an optimizer's state, looked for in this order."""
TORCHAO = "torchao.optim"
StateDict = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """An optimizer's state dict in a file.

    Attributes:
        path: the file.
        content: all of it.
        key: where the state dict is in it, with dots between levels; "" if it is all.
        state_dict: the state dict.
        shapes: of all parameters by number, if the file has them.
        optimizer: the name of the class, if the file has it.
    """

    path: Path
    content: Any
    key: str
    state_dict: StateDict
    shapes: dict[Any, tuple[int, ...]]
    optimizer: str = ""


def load_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """Reads a checkpoint; nothing in it is executed.

    Args:
        path: a torch file, or a file of ``save_safetensors``.
        key: the entry with the optimizer's state dict, with dots between levels; None: the file
            itself, or one of `KEYS`.

    Raises:
        ValueError: it cannot be read, or has no optimizer's state dict there.
    """
    if path.suffix == ".safetensors":
        if key is not None:
            raise ValueError(f"key={key!r}: only for a torch checkpoint, not for {path}")
        return _of_safetensors(path)
    content = _loaded(path)
    found = key if key is not None else _key_of(content)
    state_dict = content if found == "" else entry_at(path, content, found)
    if not is_state_dict(state_dict):
        wanted = "state and param_groups"
        raise ValueError(f"{path}: entry {found!r} is no optimizer's state dict, with {wanted}")
    return Checkpoint(path, content, found, state_dict, {})


def _of_safetensors(path: Path) -> Checkpoint:
    try:
        saved = read_safetensors(path)
    except (OSError, KeyError) as error:
        raise ValueError(str(error.args[0] if error.args else error)) from error
    numbers = [n for group in saved.state_dict["param_groups"] for n in group["params"]]
    shapes = dict(zip(numbers, map(tuple, saved.shapes), strict=True))
    return Checkpoint(path, None, "", saved.state_dict, shapes, saved.optimizer)


def _loaded(path: Path) -> Any:
    try:
        return load_torch_file(path)
    except ValueError as error:
        if TORCHAO.partition(".")[0] not in str(error.__cause__):
            raise
    try:
        # which allows torch to load its tensors
        import_module(TORCHAO)
    except ImportError as error:
        raise ValueError(
            f"{path}: its tensors are torchao's, which is needed to read them: pip install torchao"
        ) from error
    return load_torch_file(path)


def _key_of(content: Any) -> str:
    if is_state_dict(content):
        return ""
    for key in KEYS:
        try:
            found = entry_at(Path(), content, key)
        except ValueError:
            continue
        if is_state_dict(found):
            return key
    return ""


def is_state_dict(value: Any) -> bool:
    """Whether a value has the layout of ``torch.optim``'s state dicts."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
    )


def library_of(state_dict: Mapping[str, Any]) -> str:
    """The library that wrote a state dict, by the entries that it has.

    Returns:
        "optstate", "optstate-wrap" (packed), "torchao", "bitsandbytes", "turboadam-0.2",
        "torchastic" or "torch".
    """
    wrapped = state_dict.get("optstate_wrap")
    if isinstance(wrapped, Mapping) and wrapped.get("packed"):
        return "optstate-wrap"
    if any("formats" in group for group in state_dict["param_groups"]):
        return "optstate"
    for entry in state_dict["state"].values():
        if not isinstance(entry, Mapping):
            continue
        keys = set(entry)
        if keys & {"state1", "__bnb_optimizer_quant_state__"}:
            return "bitsandbytes"
        if keys & {"ustate", "v_state"}:
            return "turboadam-0.2"
        if keys & {"ema", "ema_squared"}:
            return "torchastic"
        if any(type(v).__module__.startswith("torchao") for v in entry.values()):
            return "torchao"
    return "torch"


def moment_shape(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of the moments in a state of plain tensors; None if there is none."""
    found = [v for k, v in entry.items() if isinstance(v, Tensor) and k != "step"]
    return tuple(found[0].shape) if found else None
