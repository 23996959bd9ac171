"""Plots a comparison: loss curves on the left, memory bars on the right."""

from io import BytesIO
from typing import Any

from optstate.demo.compare import Comparison, short
from optstate.demo.report import MIB
from optstate.siblings import require

COLOURS = ("#4c566a", "#d0622b", "#2b7fb8", "#4f9d58", "#8e5ea2")
PARTS = {"parameters": "#c9ced6", "gradients": "#9aa3b0", "state": "#d0622b"}


def png(comparison: Comparison) -> bytes:
    """The picture as a PNG, drawn without a display.

    Args:
        comparison: Finished runs.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure")
    figure = figure_module.Figure(figsize=(11, 4.5), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    _draw_curves(curves, comparison)
    _draw_bars(bars, comparison)
    settings = comparison.settings
    figure.suptitle(
        f"A {comparison.baseline.parameters:,}-parameter byte GPT, seed {settings.seed},"
        f" {settings.device}"
    )
    file = BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _draw_curves(axes: Any, comparison: Comparison) -> None:
    for index, run in enumerate(comparison.runs):
        colour = COLOURS[index % len(COLOURS)]
        steps = range(1, len(run.train) + 1)
        axes.plot(steps, smoothed(run.train), color=colour, alpha=0.45, linewidth=1)
        axes.plot(
            *zip(*run.validation, strict=True),
            color=colour,
            marker="osD^v"[index % 5],
            linestyle="--" if index else "-",
            label=f"{short(run.name)}: {run.validation_loss:.3f}",
        )
    axes.set(
        xlabel="step", ylabel="loss, nats per byte", title="Loss (thin: train, dots: held out)"
    )
    axes.grid(alpha=0.3)
    axes.legend(title="held out, at the end")


def _draw_bars(axes: Any, comparison: Comparison) -> None:
    names = [short(run.name) for run in comparison.runs]
    bottom = [0.0] * len(names)
    for part, colour in PARTS.items():
        sizes = [getattr(run.memory, part) / MIB for run in comparison.runs]
        drawn = axes.bar(names, sizes, bottom=bottom, color=colour, label=part, width=0.6)
        axes.bar_label(drawn, [f"{size:.2f}" for size in sizes], label_type="center", fontsize=9)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    axes.set(ylabel="MiB", title="Memory, counted over tensors", ylim=(0, 1.25 * max(bottom)))
    axes.legend(ncols=3, fontsize=8, loc="upper center")


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Bias-corrected exponential moving average."""
    out: list[float] = []
    total = norm = 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(total / norm)
    return out
