"""Metrics of a training run: writes a CSV file with a row for each step, and plots memory."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optstate_wrap.wrapper import OptimizerWrapper

__all__ = ["COLUMNS", "MetricsWriter", "plot_memory"]

COLUMNS = (
    "run",
    "step",
    "loss",
    "accuracy",
    "val_accuracy",
    "step_time_ms",
    "tensor_mem_mb",
    "materialize_ms",
    "inner_step_ms",
    "commit_ms",
    "overhead_ms",
    "cpu_mem_mb",
    "gpu_mem_mb",
    "gpu_peak_mb",
    "compression_active",
)
MB = 1e6


class MetricsWriter:
    """Appends a row for each step to a CSV file with the columns ``COLUMNS``.

    Times are written if the optimizer was wrapped with ``profile=True``. ``tensor_mem_mb`` is the
    memory of the optimizer's state, ``cpu_mem_mb`` the process's largest resident size so far.

    Args:
        path: the file; overwritten unless it has these columns already.
        run: the name of the run, written in each row.

    Examples:
        >>> with MetricsWriter("run.csv", "int8") as metrics:
        ...     metrics.write(optimizer, step, loss=loss)
    """

    def __init__(self, path: str | Path, run: str = "") -> None:
        self.run = run
        path = Path(path)
        known = path.exists() and path.read_text().startswith(",".join(COLUMNS))
        self._file = path.open("a" if known else "w", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        if not known:
            self._writer.writeheader()

    def write(
        self,
        optimizer: OptimizerWrapper,
        step: int,
        loss: float | None = None,
        accuracy: float | None = None,
        val_accuracy: float | None = None,
    ) -> dict[str, Any]:
        """Write the row of the step that was just taken, and return it."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        given = {"loss": loss, "accuracy": accuracy, "val_accuracy": val_accuracy}
        row.update({key: float(value) for key, value in given.items() if value is not None})
        row.update({key: round(ms, 3) for key, ms in optimizer.last_step_timings.items()})
        row.update(
            run=self.run,
            step=step,
            tensor_mem_mb=optimizer.memory_report().state_bytes / MB,
            cpu_mem_mb=_resident_mb(),
            compression_active=int(optimizer.compression_active),
        )
        if torch.cuda.is_available():
            row["gpu_mem_mb"] = torch.cuda.memory_allocated() / MB
            row["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / MB
        self._writer.writerow(row)
        self._file.flush()
        return row

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _resident_mb() -> float | str:
    """The largest resident size of this process; "" if the system does not report it."""
    try:
        import resource
    except ImportError:
        return ""
    # in bytes on macOS, elsewhere in KiB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def plot_memory(
    state_bytes: Mapping[str, Sequence[float] | float], path: str | Path, title: str = ""
) -> None:
    """Plot the memory of optimizers' states as bars; needs matplotlib, and follows its style.

    Args:
        state_bytes: bytes by name, or a sequence of bytes, of which the largest is drawn.
        path: of the picture; its suffix says the kind, such as ``.png`` or ``.svg``.
        title: of the plot.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("plot_memory: needs matplotlib; pip install matplotlib") from error
    names = list(state_bytes)
    sizes = [max(v) if isinstance(v, Sequence) else v for v in state_bytes.values()]
    figure = Figure(figsize=(5, 0.9 + 0.4 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(names[::-1], [size / MB for size in sizes[::-1]])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set_xlabel("optimizer state, MB")
    axes.margins(x=0.12)
    axes.set_title(title)
    figure.savefig(path, dpi=120)
