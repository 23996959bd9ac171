"""Draws the plots of the docs from committed results, and those of the tutorials by running them.

    python benchmarks/plots.py               docs/images/*.svg from benchmarks/results/*.json
    python benchmarks/plots.py --tutorials   docs/tutorials/*.svg too, which takes minutes

The first kind is the same on every machine, and a test compares it with what is committed.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from plot_theme import LIGHT, WIDTH, save, style

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
MODEL = 8_030_261_248
"""Parameters of Llama 3 8B."""

Row = dict[str, Any]

# what the timings call an optimizer, what the plots call it, and whether it is one of ours
STEPS = (
    ("AdamW8bit", "lowbit_adam AdamW8bit", True),
    ("AdamW4bit", "lowbit_adam AdamW4bit", True),
    ("TurboAdam", "turboadam TurboAdam", True),
    ("torch fused", "torch AdamW, fused", False),
    ("flashoptim", "FlashOptim FlashAdamW", False),
    ("torchao", "torchao AdamW8bit", False),
    ("torchao-4bit", "torchao AdamW4bit", False),
    ("bitsandbytes", "bitsandbytes AdamW8bit", False),
)
LAYOUT, DTYPE = "llama1b", "bfloat16"
# Before this day state in attributes of objects was not counted, where FlashOptim keeps its own.
MISCOUNTED, COUNTED_SINCE = "flashoptim", "2026-11-28"


def load(name: str) -> Any:
    """One result file."""
    return json.loads((RESULTS / name).read_text())


def timings(card: str) -> dict[str, Row]:
    """The newest committed row of each optimizer on a card, for one model in bf16."""
    reports = [load(path.name) for path in RESULTS.glob(f"step_time_{card}*.json")]
    found = {}
    for report in sorted(reports, key=lambda report: report["time"]):
        for row in report["rows"]:
            if (row["layout"], row["dtype"]) == (LAYOUT, DTYPE) and "error" not in row:
                wrong = row["optimizer"] == MISCOUNTED and report["time"] < COUNTED_SINCE
                counted = {} if wrong else {"bits": row["state_bits_per_parameter"]}
                share = {} if wrong else {"share": row["copy_share"]}
                found[row["optimizer"]] = {"ms": row["device_ms"], **counted, **share}
    return found


def bars(heading: str, rows: list[tuple[str, float, str, bool]]) -> Figure:
    """Horizontal bars, the shortest first, each below its name and with its figure behind it."""
    rows = sorted(rows, key=lambda row: row[1])
    height = 0.42 * len(rows) + 0.36
    longest = 1.42 * rows[-1][1]
    figure = Figure(figsize=(WIDTH, height))
    figure.text(0.005, 1 - 0.06 / height, heading, va="top", color=LIGHT["quiet"])
    axes = figure.add_axes((0.005, 0, 0.99, 1 - 0.34 / height))
    axes.set(xlim=(0, longest), ylim=(len(rows) - 0.7, -0.7))
    axes.set_axis_off()
    for place, (name, value, label, ours) in enumerate(rows):
        axes.barh(place, value, height=0.34, color=LIGHT["ours" if ours else "other"])
        axes.text(0, place - 0.22, name, va="bottom", weight="bold" if ours else "normal")
        axes.text(value + longest / 80, place, label, va="center", color=LIGHT["quiet"])
    return figure


def step_time(card: str = "h200") -> Figure:
    """Milliseconds of a step, and the share of the bandwidth of a copy."""
    found, rows = timings(card), []
    for key, name, ours in STEPS:
        if row := found.get(key):
            share = f", {100 * row['share']:.0f} %" if "share" in row else ""
            rows.append((name, row["ms"], f"{row['ms']:.1f} ms{share}", ours))
    return bars("GPU time of a step, and share of copy bandwidth", rows)


def memory(card: str = "h200") -> Figure:
    """Gigabytes of state for a model of 8 billion parameters."""
    counted = {row["optimizer"]: row for row in load("state_bytes.json")["rows"]}
    bits = [("torch AdamW, fp32 parameters", counted["AdamW"]["state_bits_per_parameter"], False)]
    found = timings(card)
    bits += [
        (name + ", bf16 parameters" * (key == "torch fused"), found[key]["bits"], ours)
        for key, name, ours in STEPS
        if "bits" in found.get(key, ())
    ]
    rows = [
        (name, size := MODEL * each / 8e9, f"{size:.1f} GB, {each:.1f} bits", ours)
        for name, each, ours in bits
    ]
    return bars("Optimizer state of an 8B model, and bits per parameter", rows)


PLOTS: dict[str, tuple[Callable[[], Figure], str]] = {
    "step-time.svg": (step_time, "Time of an optimizer step of 1.1 billion bf16 parameters"),
    "memory.svg": (memory, "Optimizer state of an 8B model"),
}


def draw(folder: Path) -> None:
    """Write every plot that is made from results."""
    with style():
        for name, (make, title) in PLOTS.items():
            save(make(), folder / name, title)


def main() -> None:
    """Draws what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder to write to")
    args = parser.parse_args()
    draw(args.images)


if __name__ == "__main__":
    main()
