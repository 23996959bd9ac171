"""Draws the plots of the docs from committed results, and those of the tutorials by running them.

    python benchmarks/plots.py               docs/images/*.svg from benchmarks/results/*.json
    python benchmarks/plots.py --tutorials   docs/tutorials/*.svg too, which takes minutes

The first kind is the same on every machine, and a test compares it with what is committed.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure
from plot_theme import LIGHT, WIDTH, save, style, themed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
MODEL = 8_030_261_248
"""Parameters of Llama 3 8B."""

Row = dict[str, Any]

# what the timings call an optimizer, what the plots call it, and whether it is one of ours
STEPS = (
    ("AdamW8bit", "lowbit_adam AdamW8bit", True),
    ("AdamW4bit", "lowbit_adam AdamW4bit", True),
    ("TurboAdam", "turboadam TurboAdam, mode adamw", True),
    ("TurboAdam 2 + 3, flush", "turboadam TurboAdam", True),
    ("torch fused", "torch AdamW, fused", False),
    ("flashoptim", "FlashOptim FlashAdamW", False),
    ("torchao", "torchao AdamW8bit", False),
    ("torchao-4bit", "torchao AdamW4bit", False),
    ("bitsandbytes", "bitsandbytes AdamW8bit", False),
)
LAYOUT, DTYPE = "llama1b", "bfloat16"
# Before this day state in attributes of objects was not counted, where FlashOptim keeps its own.
MISCOUNTED, COUNTED_SINCE = "flashoptim", "2026-11-28"

# file, what it calls an optimizer, what the plot calls it, whether it is one of ours
LEARNT = (
    ("convergence_gpt.json", "AdamW foreach", "torch, foreach=True", False),
    ("convergence_gpt.json", "AdamW8bit", "AdamW8bit", True),
    ("convergence_gpt.json", "AdamWFp8", "AdamWFp8", True),
    ("convergence_gpt.json", "AdamW4bit", "AdamW4bit", True),
    ("convergence_gpt_turboadam.json", "TurboAdam", "TurboAdam, mode adamw", True),
    ("convergence_gpt_turboadam.json", "TurboAdam 2 + 3", "TurboAdam, mode adamw, 2 + 3", True),
    ("convergence_gpt_stochbf16.json", "stochbf16 AdamW", "stochbf16 AdamW", True),
    ("convergence_gpt_stochbf16.json", "AdamW bf16", "torch, all bf16", False),
)
RATES = (1e-3, 5e-4)
OFFLOADED = (
    ("AdamW8bit", "AdamW8bit, state on the GPU", True),
    ("4-bit offloaded", "4-bit state, offload()", True),
    ("int8 offloaded", "int8 state, offload()", True),
    ("bf16 offloaded", "bf16 state, offload()", True),
    ("exact offloaded", "fp32 state, offload()", True),
    ("torchao CPUOffload", "torchao CPUOffloadOptimizer", False),
)
TOKENS = 4096
ARRANGEMENTS = (
    ("8-bit", "AdamW8bit", "ours"),
    ("FP8", "AdamWFp8", "blue"),
    ("4-bit", "AdamW4bit", "green"),
    ("8-bit, roots to nearest", "8-bit, rounded to nearest", "other"),
    ("4-bit, as published", "4-bit, as published", "violet"),
)


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
                times = {"ms": row["device_ms"], "whole_ms": row["whole_ms"]}
                found[row["optimizer"]] = {**times, **counted, **share}
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


def convergence() -> Figure:
    """Held-out loss less AdamW's of matched runs, with its standard deviation over seeds."""
    rows = []
    for file, key, name, ours in LEARNT:
        found = {r["lr"]: r for r in load(file)["summary"] if r["optimizer"] == key}
        rows.append((name, [found.get(lr) for lr in RATES], ours))
    height = 0.36 * len(rows) + 0.9
    figure = Figure(figsize=(WIDTH, height))
    figure.text(
        *(0.005, 1 - 0.06 / height, "Held-out loss minus AdamW's, nats per byte, 3 seeds"),
        **{"va": "top", "color": LIGHT["quiet"]},
    )
    axes = figure.add_axes((0.38, 0.34 / height, 0.6, 1 - 0.98 / height))
    axes.axvline(0, color=LIGHT["line"], linewidth=1.5, zorder=0)
    for number, (lr, colour) in enumerate(zip(RATES, ("ours", "blue"), strict=True)):
        for place, (_, results, _) in enumerate(rows):
            if row := results[number]:
                axes.errorbar(
                    *(row["difference"], place + 0.26 * number - 0.13),
                    xerr=row["difference_spread"],
                    **{"color": LIGHT[colour], "fmt": "os"[number], "markersize": 5},
                )
        axes.plot([], [], "os"[number], color=LIGHT[colour], markersize=5, label=f"lr {lr:g}")
    axes.set(ylim=(len(rows) - 0.5, -0.5), xticks=(0, 0.005, 0.01, 0.015))
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], color=LIGHT["text"])
    for label, (_, _, ours) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_weight("bold" if ours else "normal")
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="x", alpha=0.5)
    axes.legend(
        **{"loc": "lower left", "bbox_to_anchor": (-0.02, 1), "ncols": 2, "borderaxespad": 0},
        **{"handletextpad": 0.1, "columnspacing": 1},
    )
    return figure


def offloaded_steps(tokens: int) -> dict[str, Row]:
    """The training steps of so many tokens, by what their optimizer is called."""
    rows = load("offload_h200.json")["train"]["result"]
    return {row["optimizer"]: row for row in rows if row["tokens"] == tokens}


def offload() -> Figure:
    """Milliseconds of a training step with state in host memory."""
    found, rows = offloaded_steps(TOKENS), []
    for key, name, ours in OFFLOADED:
        row = found[key]
        gigabytes = row["host_bytes_per_parameter"] * row["parameters"] / 1e9
        label = f"{row['ms']:.0f} ms, {gigabytes:.1f} GB" if gigabytes else f"{row['ms']:.0f} ms"
        rows.append((name, row["ms"], label, ours))
    return bars("A training step, and state in host memory", rows)


def fidelity() -> Figure:
    """Gain by beta2 for dense and sparse gradients, for the defaults and what they came from."""
    rows = load("fidelity.json")["rows"]
    figure = Figure(figsize=(WIDTH, 5.8))
    boxes = (0.1, 0.52, 0.88, 0.29), (0.1, 0.09, 0.88, 0.29)
    for kind, box in zip(("dense", "5 % sparse"), boxes, strict=True):
        axes = figure.add_axes(box)
        for number, (key, name, colour) in enumerate(ARRANGEMENTS):
            gains = {
                str(row["beta2"]): row["gain"]
                for row in rows
                if (row["arrangement"], row["gradients"]) == (key, kind)
            }
            axes.plot(
                *zip(*gains.items(), strict=True),
                **{"label": name, "color": LIGHT[colour], "marker": "osD^v"[number]},
                **{"linestyle": "--" if "," in key else "-", "markersize": 5},
            )
        axes.axhspan(0.95, 1.05, color=LIGHT["line"], alpha=0.5, linewidth=0)
        axes.set(title=f"Gain, {kind} gradients", ylim=(0.3, 2.1))
        axes.tick_params(length=0)
    axes.set_xlabel("beta2")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        **{"loc": "upper left", "bbox_to_anchor": (0, 1), "ncols": 2, "borderaxespad": 0},
        **{"columnspacing": 1, "borderpad": 0.2},
    )
    return figure


PLOTS: dict[str, tuple[Callable[[], Figure], str]] = {
    "images/step-time.svg": (step_time, "Time of an optimizer step of 1.1 billion bf16 parameters"),
    "images/memory.svg": (memory, "Optimizer state of an 8B model"),
    "images/convergence.svg": (convergence, "Held-out loss of matched runs, minus AdamW's"),
    "images/offload.svg": (offload, "Time of a training step with state in host memory"),
    "concepts/fidelity.svg": (fidelity, "Gain of the update by beta2; exact Adam has 1"),
}


def draw(folder: Path) -> None:
    """Write every plot that is made from results."""
    with style():
        for name, (make, title) in PLOTS.items():
            save(make(), folder / name, title)


@contextmanager
def inside(folder: str) -> Iterator[None]:
    """Work in a folder; `contextlib.chdir` is newer than Python 3.10."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def draw_tutorial(page: Path, folder: Path) -> None:
    """Run a page in an empty folder, and write the SVGs that it makes."""
    title, text = page.read_text().split("\n", 1)
    if ".svg" not in text:
        return
    print(page.name)
    run = run_path(str(ROOT / "tests-integration" / "run_examples.py"))["run"]
    with TemporaryDirectory() as scratch, inside(scratch), style():
        run(page)
        for made in Path(scratch).glob("*.svg"):
            (folder / made.name).write_text(themed(made.read_text(), title.strip("# ")))


def main() -> None:
    """Draws what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tutorials", action="store_true", help="run the tutorials for their plots"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    args = parser.parse_args()
    draw(args.docs)
    if args.tutorials:
        for page in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
            draw_tutorial(page, args.docs / "tutorials")


if __name__ == "__main__":
    main()
