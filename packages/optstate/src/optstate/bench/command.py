"""Runs ``optstate bench``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from optstate.console import (
    blame,
    check_writable,
    note,
    output,
    print_json,
    reported,
    require_all,
    table,
)
from optstate.files import write_files

if TYPE_CHECKING:
    import torch

    from optstate.bench.contestants import Make
    from optstate.models.model import Model

BASELINE = "torch fused"
ABOUT = (
    "ms: median of a step. GB/s: bytes that a step must move (parameter, gradient and state read;"
    " parameter and state written) over that time; share: of the speed of a copy. temp: memory"
    " that a step needs besides. first: seconds of the first step, in which kernels are built."
)


def run(
    source: str,
    *,
    optimizers: Sequence[str],
    layers: int | None,
    dtype: str,
    device: str | None,
    repeats: int,
    seconds: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measures and reports; the arguments are those of the command.

    Raises:
        typer.BadParameter: An argument's value is not allowed.
        typer.Exit: With code 1 if something is not installed.
    """
    require_all("codecs", "torch", "optstate_codecs")
    import torch

    from optstate.device import check_device
    from optstate.models.model import DTYPES
    from optstate.models.sources import read_model

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with blame("--device"):
        check_device(device)
    with blame("MODEL"):
        model = read_model(source, DTYPES[dtype], layers=layers)
    with blame("--optimizer"), reported():
        chosen, versions = contestants_named(optimizers)
    if out is not None:
        check_writable("--out", out)

    console = output(stderr=as_json, width=110)
    report = measure_all(chosen, model, torch.device(device), (repeats, seconds), console)
    report["versions"] = versions
    if out is not None:
        write_files({out: f"{json.dumps(report, indent=1)}\n".encode()})
    if as_json:
        print_json(report)
        return
    console.print(times_table(report))
    for row in report["rows"]:
        if "error" in row:
            note(console, f"{row['optimizer']} failed: {row['error']}")
    note(console, ABOUT)


def contestants_named(
    names: Sequence[str],
) -> "tuple[list[tuple[str, Make]], dict[str, str]]":
    """The optimizers to time, and the versions of their libraries.

    Args:
        names: of known contestants, or as `parse` takes them; none: the default ones and every
            other library that is installed.

    Raises:
        ValueError: a name is not known, or the optimizer cannot be used.
        MissingExtra: an optimizer of the family is not installed.
    """
    from optstate.bench.contestants import CHOSEN, KNOWN, contestants, is_peer
    from optstate.optimizers import check_usable, parse

    known = contestants()
    peers = [name for name in known if name in KNOWN and is_peer(name)]
    chosen: list[tuple[str, Make]] = []
    for name in names or [*(name for name in CHOSEN if name in known), *peers]:
        if name in known:
            chosen.append((name, known[name][0]))
        elif name in KNOWN:
            raise ValueError(f"{name!r}: needs {KNOWN[name][1]}, which is not installed")
        else:
            make = parse(name)
            check_usable(name, make, 1e-3)
            chosen.append((name, make))
    return chosen, {name: known[name][1] for name, _ in chosen if name in known}


def measure_all(
    chosen: "Sequence[tuple[str, Make]]",
    model: "Model",
    device: "torch.device",
    limits: tuple[int, float],
    console: Console,
) -> dict[str, Any]:
    """The report, with a row for each optimizer; shows progress while it measures.

    Args:
        chosen: names and optimizers.
        model: its trained parameters are stepped.
        device: that they are on.
        limits: steps to time, and seconds for each optimizer.
        console: for the progress.
    """
    from optstate.bench.measure import measured
    from optstate.bench.timing import copy_bandwidth, surroundings

    repeats, seconds = limits
    shapes = [entry.shape for entry in model.trained]
    dtype = model.trained[0].dtype
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    rows = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("copy", total=1 + len(chosen))
        bandwidth = copy_bandwidth(device)
        for name, make in chosen:
            progress.update(task, advance=1, description=name)
            row = measured(make, shapes, dtype, device, repeats, bandwidth, seconds)
            rows.append({"optimizer": name, **row})
            if progress.disable:
                time = f"{row['device_ms']:.2f} ms" if "device_ms" in row else row["error"]
                note(console, f"{name}: {time}")
        progress.update(task, advance=1)
    return {
        **surroundings(device, repeats, bandwidth),
        "model": model.source,
        "dtype": model.dtypes,
        "parameters": model.parameters,
        "rows": rows,
    }


def times_table(report: dict[str, Any]) -> Table:
    """The fastest first."""
    title = (
        f"A step of {report['model']}: {report['parameters']:,} parameters in {report['dtype']}, on"
        f" {report['device']}; a copy: {report['copy_bandwidth_gb_s']:.1f} GB/s"
    )
    rows = sorted((r for r in report["rows"] if "error" not in r), key=lambda r: r["device_ms"])
    baseline = next((row for row in rows if row["optimizer"] == BASELINE), None)
    heads = ("ms", f"vs\n{BASELINE}", "GB/s", "share", "state\nbits/param", "temp\nMB", "first\ns")
    made = table(title, ("optimizer", *heads))
    for row in rows:
        temporary = row["temporary_bytes"]
        made.add_row(
            row["optimizer"],
            f"{row['device_ms']:.2f}",
            "" if baseline is None else f"{row['device_ms'] / baseline['device_ms']:.2f}",
            f"{row['moved_bytes'] / row['device_ms'] / 1e6:.1f}",
            f"{100 * row['copy_share']:.0f} %",
            f"{row['state_bits_per_parameter']:.2f}",
            "" if temporary is None else f"{temporary / 1e6:.1f}",
            f"{row['first_step_s']:.2f}",
        )
    return made
