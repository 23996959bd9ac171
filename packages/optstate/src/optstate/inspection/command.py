"""Runs ``optstate inspect``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from optstate.console import blame, note, output, print_json, require_all, table

if TYPE_CHECKING:
    from optstate.inspection.state import Contents, ParamState

SHOWN = ("lr", "betas", "momentum", "weight_decay", "block_size", "m_bits", "v_bits")
"""Values of a group that the text report names; JSON has all."""


def run(file: Path, *, key: str | None, tensors: bool, as_json: bool) -> None:
    """Reads and reports; the arguments are those of the command.

    Raises:
        typer.BadParameter: There is no optimizer state, or it cannot be read.
        typer.Exit: With code 1 if something is not installed.
    """
    require_all("codecs", "torch", "optstate_codecs")
    from optstate.inspection.files import read_contents

    with blame("FILE"):
        contents = read_contents(file, key)
    report = as_dict(file, contents)
    if as_json:
        print_json(report)
        return
    console = output(width=120)
    note(console, headline(report))
    for index, group in enumerate(report["groups"]):
        values = ", ".join(f"{name} {group[name]}" for name in SHOWN if name in group)
        note(console, f"group {index}: {group['params']} parameters; {values}")
    console.print(keys_table(report))
    if tensors:
        console.print(tensors_table(report))


def as_dict(file: Path, contents: "Contents") -> dict[str, Any]:
    """The report as plain values, with bytes under stable keys."""
    steps = [param.step for param in contents.params if param.step is not None]
    nbytes = sum(param.nbytes for param in contents.params)
    return {
        "file": str(file),
        "kind": contents.kind,
        "library": contents.library,
        "optimizer": contents.optimizer or None,
        "parameters": contents.numel,
        "tensors": len(contents.params),
        "state_bytes": nbytes,
        "bits_per_parameter": bits(nbytes, contents.numel),
        "steps": [min(steps), max(steps)] if steps else None,
        "groups": list(contents.groups),
        "keys": list(keys(contents)),
        "states": [state(contents, param) for param in contents.params],
    }


def bits(nbytes: int, numel: int | None) -> float | None:
    """Bits for each element; None if there are none, or their number is not known."""
    return 8 * nbytes / numel if numel else None


def keys(contents: "Contents") -> Iterator[dict[str, Any]]:
    """For each group and key of state: its format, dtype, tensors and bytes."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    elements: dict[tuple[Any, ...], int | None] = {}
    for param in contents.params:
        for part in param.parts:
            format_ = contents.format_of(param, part.key)
            where = (param.group, part.key, format_, part.dtype)
            names = ("group", "key", "format", "dtype")
            row = found.setdefault(
                where, {**dict(zip(names, where, strict=True)), "tensors": 0, "bytes": 0}
            )
            row["tensors"] += 1
            row["bytes"] += part.nbytes
            before = elements.get(where, 0)
            both = before is not None and param.numel is not None
            elements[where] = (before or 0) + (param.numel or 0) if both else None
    for where, row in found.items():
        yield {**row, "bits_per_parameter": bits(row["bytes"], elements[where])}


def state(contents: "Contents", param: "ParamState") -> dict[str, Any]:
    """The state of one parameter."""
    return {
        "parameter": param.name,
        "group": param.group,
        "shape": None if param.shape is None else list(param.shape),
        "step": param.step,
        "bytes": param.nbytes,
        "bits_per_parameter": bits(param.nbytes, param.numel),
        "keys": {
            part.key: {
                "bytes": part.nbytes,
                "dtype": part.dtype,
                "format": contents.format_of(param, part.key),
            }
            for part in param.parts
        },
    }


def headline(report: dict[str, Any]) -> str:
    """What the file is, and its sums."""
    name = report["optimizer"] or f"state dict of {report['library']}"
    steps = report["steps"]
    counts = "" if steps is None else f", step {steps[0]:g}"
    if steps is not None and steps[0] != steps[1]:
        counts = f", steps {steps[0]:g} to {steps[1]:g}"
    size = f"{report['tensors']} tensors"
    if report["parameters"] is not None:
        size += f" of {report['parameters']:,} parameters"
    each = report["bits_per_parameter"]
    ratio = "" if each is None else f", {each:.2f} bits for each parameter"
    return (
        f"{report['file']}: {report['kind']}, {name}{counts}\n{size}; state of"
        f" {report['state_bytes']:,} bytes{ratio}"
    )


def keys_table(report: dict[str, Any]) -> Table:
    """One row for each group and key of state."""
    made = table(
        "", ("group", "key", "format", "stored as", "tensors", "bytes", "bits/param"), left=4
    )
    # long ones go on in the next line
    made.columns[2].no_wrap = False
    for row in report["keys"]:
        made.add_row(
            "" if row["group"] is None else str(row["group"]),
            row["key"],
            row["format"],
            row["dtype"],
            str(row["tensors"]),
            f"{row['bytes']:,}",
            figure(row["bits_per_parameter"]),
        )
    return made


def tensors_table(report: dict[str, Any]) -> Table:
    """One row for each parameter."""
    made = table("", ("parameter", "shape", "group", "step", "bytes", "bits/param"), left=2)
    for row in report["states"]:
        made.add_row(
            row["parameter"],
            "" if row["shape"] is None else " x ".join(map(str, row["shape"])) or "scalar",
            "" if row["group"] is None else str(row["group"]),
            "" if row["step"] is None else f"{row['step']:g}",
            f"{row['bytes']:,}",
            figure(row["bits_per_parameter"]),
        )
    return made


def figure(value: float | None) -> str:
    """Two decimals; empty for an unknown value."""
    return "" if value is None else f"{value:.2f}"
