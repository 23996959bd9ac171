"""Runs ``optstate convert``."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from optstate.console import (
    blame,
    check_writable,
    note,
    output,
    print_json,
    reported,
    require_all,
)
from optstate.convert.names import LIBRARIES, WRITTEN_BY_OTHERS

if TYPE_CHECKING:
    from optstate.checkpoints import Checkpoint

PARAMETERS_STAY = (
    "master weights were dropped with their corrections: torch.optim has none. Save"
    " master_state_dict as the weights, or train on from rounded ones."
)


def run(
    source: Path,
    target: Path,
    *,
    to: str,
    library: str | None,
    key: str | None,
    shapes: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Converts and reports; the arguments are those of the command.

    Raises:
        typer.BadParameter: An argument's value is not allowed; nothing was written.
        typer.Exit: With code 1 if something is not installed.
    """
    _check_names(to, library)
    check_writable("TARGET", target)
    if target.exists() and not force:
        raise typer.BadParameter(
            f"{target}: there already; --force overwrites it", param_hint="TARGET"
        )
    require_all("codecs", "torch", "optstate_codecs")
    from optstate.checkpoints import library_of, load_checkpoint
    from optstate.convert.between import library_named, to_family, to_torch
    from optstate.convert.packed import write_of
    from optstate.optimizers import parse

    with blame("SOURCE"):
        checkpoint = load_checkpoint(source, key)
    with blame("--from"):
        found = library_named(checkpoint, library)
    with blame("--shapes"):
        known = shapes_by_number(checkpoint, shapes)
    notes: list[str] = []
    with blame("SOURCE"), reported(), _as_value_errors(), _warnings_into(notes):
        if to == "torch":
            if target.suffix == ".safetensors":
                raise ValueError(f"{target}: packed state only; torch.optim's goes to a torch file")
            if found == "optstate" and write_of(checkpoint.state_dict) != "nearest":
                notes.append(PARAMETERS_STAY)
            converted = to_torch(found, checkpoint, known)
            save_torch(checkpoint, converted, target)
        else:
            with blame("--to"):
                make = parse(to)
            optimizer = to_family(found, checkpoint, make, known)
            converted = optimizer.state_dict()
            if target.suffix == ".safetensors":
                from optstate_codecs import save_safetensors

                save_safetensors(optimizer, target)
            else:
                save_torch(checkpoint, converted, target)
    result = {
        "source": str(source),
        "target": str(target),
        "key": checkpoint.key,
        "from": found,
        "to": to,
        "parameters": len(converted["state"]),
        "bytes_before": tensor_bytes(checkpoint.state_dict),
        "bytes_after": tensor_bytes(converted),
        "notes": notes,
    }
    assert to != "torch" or library_of(converted) == "torch"
    if as_json:
        print_json(result)
        return
    console = output()
    note(
        console,
        f"{source} ({found}) -> {target} ({to}): state of {result['parameters']} parameters,"
        f" {result['bytes_before']:,} bytes -> {result['bytes_after']:,} bytes",
    )
    for text in notes:
        note(console, text)


def _check_names(to: str, library: str | None) -> None:
    allowed = f"must be one of {', '.join(LIBRARIES)}"
    if library is not None and library not in LIBRARIES:
        raise typer.BadParameter(f"{library!r}: {allowed}", param_hint="--from")
    if to in WRITTEN_BY_OTHERS:
        raise typer.BadParameter(
            f"{to!r}: only read, not written, since only its own code makes its codes; convert to"
            " torch, and load that where it takes it",
            param_hint="--to",
        )


def shapes_by_number(checkpoint: "Checkpoint", model: str | None) -> "dict[Any, tuple[int, ...]]":
    """The shapes of a model's parameters by their numbers in a checkpoint.

    Parameters are matched by name where the checkpoint has names and the model too, else in order.

    Args:
        checkpoint: of the optimizer.
        model: as `read_model` takes it; None: the weights in the same file, if it has them.

    Raises:
        ValueError: the model cannot be read, or has another number of parameters.
    """
    from optstate.models.sources import read_model
    from optstate.models.weights import parameters_in

    if model is None:
        entries = parameters_in(checkpoint.path, checkpoint.content)
    else:
        entries = read_model(model).entries
    groups = checkpoint.state_dict["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    by_name = {entry.name: entry.shape for entry in entries}
    if len(names) == len(numbers) and all(name in by_name for name in names):
        return {number: by_name[name] for number, name in zip(numbers, names, strict=True)}
    if len(entries) != len(numbers) and model is None:
        return {}
    if len(entries) != len(numbers):
        raise ValueError(
            f"{model!r}: {len(entries)} parameters, must be the checkpoint's {len(numbers)}"
        )
    return {number: entry.shape for number, entry in zip(numbers, entries, strict=True)}


def save_torch(checkpoint: "Checkpoint", converted: dict[str, Any], target: Path) -> None:
    """Writes all that the source has, with the optimizer's state replaced, whole or not at all."""
    import torch

    from optstate.files import whole_file

    content = replaced(checkpoint.content, checkpoint.key.split("."), converted)
    with whole_file(target) as part:
        torch.save(content if checkpoint.key else converted, part)


def replaced(content: Any, keys: list[str], value: Any) -> Any:
    """Nested dicts and lists with one entry replaced; the others are not copied."""
    if not keys or keys == [""]:
        return value
    if isinstance(content, list):
        index = int(keys[0])
        return [*content[:index], replaced(content[index], keys[1:], value), *content[index + 1 :]]
    return {**content, keys[0]: replaced(content[keys[0]], keys[1:], value)}


def tensor_bytes(state_dict: dict[str, Any]) -> int:
    """Bytes of the tensors in the state."""
    from optstate_codecs.memory import storage_bytes

    return int(storage_bytes(dict(state_dict["state"])))


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """Turns errors of state that does not fit into usage errors."""
    try:
        yield
    except (KeyError, TypeError, ImportError, OSError) as error:
        raise ValueError(str(error.args[0] if error.args else error)) from error


@contextmanager
def _warnings_into(notes: list[str]) -> Iterator[None]:
    """Collects warnings as lines of the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    notes += [str(warning.message) for warning in caught]
