"""Reports a comparison as a table for the terminal and as JSON."""

import json
import math
from dataclasses import asdict
from platform import python_version

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from optstate.demo.compare import Comparison, short
from optstate.demo.record import Run

MIB = 2**20


COLUMNS = (
    "train\nloss",
    "valida-\ntion\nloss",
    "vs\nbase-\nline",
    "state\nbytes/\nparam",
    "vs\nbase-\nline",
    "tensors\nMiB",
    "peak\nMiB",
    "ms/\nstep",
    "ms/\nupdate",
)


def table(comparison: Comparison) -> Table:
    """One row for each optimizer, the baseline first, in at most 80 columns."""
    settings = comparison.settings
    peak_kind = comparison.baseline.memory.peak_kind if comparison.baseline.memory else "peak"
    out = Table(
        title=(
            f"{comparison.baseline.parameters:,} parameters, {settings.steps} steps of"
            f" {settings.batch} x {settings.context} bytes, seed {settings.seed},"
            f" {settings.device}"
        ),
        caption=(
            "losses in nats per byte; tensors: parameters + gradients + state, counted;"
            f" peak: {peak_kind}"
        ),
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    out.add_column("optimizer", no_wrap=True)
    for column in COLUMNS:
        out.add_column(column, justify="right")
    for run in comparison.runs:
        out.add_row(*_cells(comparison, run))
    return out


def _cells(comparison: Comparison, run: Run) -> list[str]:
    """The cells of a row; a dash for unknown values and for the baseline against itself."""
    memory = run.memory
    share = comparison.state_share(run)
    is_baseline = run is comparison.baseline
    return [
        short(run.name),
        f"{run.train_loss:.4f}",
        f"{run.validation_loss:.4f}",
        "-" if is_baseline else f"{comparison.loss_difference(run):+.2f}%",
        f"{run.state_bytes_per_parameter:.3f}",
        "-" if is_baseline or share is None else f"{share:.1f}%",
        f"{memory.counted / MIB:.2f}" if memory else "-",
        f"{memory.peak / MIB:.0f}" if memory and memory.peak else "-",
        f"{run.ms_per_step:.1f}",
        f"{run.ms_per_update:.2f}",
    ]


def as_dict(comparison: Comparison) -> dict[str, object]:
    """Everything in the table and the curves, as plain values; sizes in bytes."""
    settings = asdict(comparison.settings)
    settings["text"] = None if settings["text"] is None else str(settings["text"])
    return {
        "versions": {"python": python_version(), "torch": torch.__version__},
        "settings": settings,
        "baseline": comparison.baseline.name,
        "runs": [
            {
                "optimizer": run.name,
                "parameters": run.parameters,
                "train_loss": run.train_loss,
                "validation_loss": run.validation_loss,
                "validation_difference_percent": comparison.loss_difference(run),
                "state_bytes_per_parameter": run.state_bytes_per_parameter,
                "ms_per_step": run.ms_per_step,
                "ms_per_update": run.ms_per_update,
                "memory": asdict(run.memory) if run.memory else None,
                "train_curve": run.train,
                "validation_curve": run.validation,
            }
            for run in comparison.runs
        ],
    }


def to_json(comparison: Comparison) -> str:
    """`as_dict` as JSON text; values that are not finite, such as a diverged loss, become null."""
    return json.dumps(_finite(as_dict(comparison)), indent=2, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
