"""Writes the docs' tables of offloaded state from the results of `offload.py`.

    python benchmarks/offload_page.py

Writes `docs/benchmarks-raw.md` and `docs/concepts/offload.md` between their markers, and nothing
else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "offload_h200.json"
MARKERS = ("<!-- written by benchmarks/offload_page.py -->", "<!-- end -->")
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
PLACES = {"host": "host", "device": "device", "cpu": "host, the step too"}

Report = dict[str, Any]
# of a table: what heads each column, and what it has of a row
Columns = dict[str, Callable[[Report], str]]


def grid(columns: Columns, rows: Sequence[Report]) -> str:
    """A Markdown table, without columns that are empty in all rows."""
    cells = [(head, [cell(row) for row in rows]) for head, cell in columns.items()]
    kept = [(head, *column) for head, column in cells if any(column)]
    lines = [f"| {' | '.join(line)} |" for line in zip(*kept, strict=True)]
    return "\n".join([lines[0], "|---" * len(kept) + "|", *lines[1:]])


def name_of(row: Report, versions: dict[str, str]) -> str:
    """The name of an optimizer in the docs."""
    name: str = row["optimizer"]
    if name == "torch fused":
        return "`torch.optim.AdamW(fused=True)`"
    if name.startswith("torchao"):
        version = versions.get("torchao", "")
        return name.replace("torchao CPUOffload", f"torchao {version} `CPUOffloadOptimizer`")
    return name.replace(" offloaded", ", offloaded").replace("AdamW8bit", "`AdamW8bit`")


def number(row: Report, key: str, digits: int, unit: float = 1) -> str:
    """A number of a row as text; empty if it has none."""
    if "error" in row:
        return "failed" if key == "ms" else ""
    return f"{row[key] / unit:.{digits}f}" if row.get(key) is not None else ""


def figure(key: str, digits: int, unit: float = 1) -> Callable[[Report], str]:
    """A column of figures."""
    return lambda row: number(row, key, digits, unit)


def setup_of(part: Report) -> str:
    """The machine and versions of a run."""
    setup = part["setup"]
    bus, triton = setup["bus_gb_s"], setup["versions"].get("triton", "none")
    return (
        f"{setup['device']}, torch {setup['torch']}, triton {triton}, chunks of "
        f"{setup['chunk_bytes'] / 2**20:.0f} MiB. Just before, the bus carried "
        f"{bus['to_device']:.1f} GB/s to the device, {bus['to_host']:.1f} to the host, and "
        f"{bus['both']:.1f} each way at the same time."
    )


def note_of(part: Report) -> str:
    """The note in the results, if any."""
    return f" ({part['note'][0].upper()}{part['note'][1:]}.)" if "note" in part else ""


def waiting(part: Report) -> str:
    """The steps of offloaded state that wait for the device."""
    rows = [row for row in part["result"] if row["place"] == "host"]
    waits = [row["optimizer"] for row in rows if row.get("without_waiting") is not True]
    which = ", ".join(dict.fromkeys(waits))
    return f"Steps that wait for the device: {which or 'none'}."


def text(sentences: str) -> str:
    """A paragraph in lines."""
    return fill(sentences, 100, break_long_words=False, break_on_hyphens=False)


def steps(part: Report) -> str:
    """The table of step times."""
    versions = part["setup"]["versions"]
    columns: Columns = {
        "optimizer": lambda row: name_of(row, versions),
        "parameters": lambda row: DTYPES[row["dtype"]],
        "state on": lambda row: PLACES[row["place"]],
        "ms": figure("ms", 1),
        "floor ms": figure("floor_ms", 1),
        "times the floor": figure("times_floor", 2),
        "returns after ms": figure("issued_ms", 1),
        "more on the device, MiB": figure("extra_device_bytes", 0, 2**20),
        "host bytes/param": figure("host_bytes_per_parameter", 2),
    }
    return grid(columns, part["result"])


def streamed(part: Report) -> str:
    """The short table of steps with offloaded state."""
    columns: Columns = {
        "state": lambda row: row["optimizer"].removesuffix(" offloaded"),
        "parameters": lambda row: DTYPES[row["dtype"]],
        "bytes/param": figure("host_bytes_per_parameter", 2),
        "floor ms": figure("floor_ms", 1),
        "ms": figure("ms", 1),
        "times the floor": figure("times_floor", 2),
    }
    return grid(columns, [row for row in part["result"] if row["place"] == "host"])


def training(part: Report) -> str:
    """The table of training steps."""
    versions = part["setup"]["versions"]
    columns: Columns = {
        "optimizer": lambda row: name_of(row, versions),
        "tokens": lambda row: f"{row.get('tokens', 4096):,}",
        "ms": figure("ms", 1),
        "times `AdamW8bit`": figure("times_resident", 2),
        "most on the device, GB": figure("peak_bytes", 2, 1e9),
        "host bytes/param": figure("host_bytes_per_parameter", 2),
    }
    return grid(columns, part["result"])


def finetuned(part: Report) -> str:
    """The table of times and memory of the large model."""
    columns: Columns = {
        "gradients": lambda row: "released" if row["released"] else "kept",
        "ms": figure("ms", 0),
        "forward and backward alone, ms": figure("ms_without_optimizer", 0),
        "most on the device, GB": figure("peak_bytes", 2, 1e9),
        "without an optimizer, GB": figure("peak_bytes_without_optimizer", 2, 1e9),
        "state on the host, GB": figure("host_bytes", 2, 1e9),
    }
    return grid(columns, part["result"])


def on_disk(part: Report) -> str:
    """The table of steps with state in a file."""
    columns: Columns = {
        "`sync`": lambda row: str(row["sync"]),
        "ms": figure("ms", 0),
        "GB/s each way": figure("gb_s_each_way", 1),
        "file bytes/param": figure("file_bytes_per_parameter", 2),
    }
    return grid(columns, part["result"])


def billions(row: Report) -> str:
    """The number of parameters in billions, as text."""
    return f"{row['parameters'] / 1e9:.2f}e9 parameters"


def sized(part: Report) -> Report:
    """A row that contains the model's size."""
    return next(row for row in part["result"] if "parameters" in row)


def benchmarks(report: Report) -> str:
    """The tables of the benchmarks page."""
    step, train, large, disk = (report[p] for p in ("step", "train", "finetune7b", "disk"))
    tensors = sized(step)["tensors"]
    return "\n\n".join(
        [
            text(f"**A step** of {billions(sized(step))} in {tensors} tensors. {setup_of(step)}"),
            steps(step),
            waiting(step),
            text(
                f"**A training step** of {billions(sized(train))} in bf16. {setup_of(train)}"
                f"{note_of(train)}"
            ),
            training(train),
            text(
                f"**Fine-tuning** {billions(sized(large))} in bf16, with "
                f"{sized(large)['format']} state offloaded, on {sized(large)['tokens']:,} tokens "
                "with checkpointed activations. Parameters and gradients take "
                f"{number(sized(large), 'parameter_and_gradient_bytes', 2, 1e9)} GB, activations "
                f"{number(sized(large), 'activation_bytes', 2, 1e9)}.{note_of(large)}"
            ),
            finetuned(large),
            text(
                f"**In a file**: int8 state of {billions(sized(disk))}. Milliseconds are those of "
                "a step among several in a row, until the file has all of it."
            ),
            on_disk(disk),
        ]
    )


def concepts(report: Report) -> str:
    """The short table of the concepts page."""
    step = report["step"]
    begin = text(f"A step of {billions(sized(step))}. {setup_of(step)}")
    return "\n\n".join([begin, streamed(step), waiting(step)])


PAGES: dict[str, Callable[[Report], str]] = {
    "docs/benchmarks-raw.md": benchmarks,
    "docs/concepts/offload.md": concepts,
}


def written(text: str, body: str) -> str:
    """A page with ``body`` between its markers."""
    begin = text.index(MARKERS[0])
    end = text.index(MARKERS[1], begin)
    return text[:begin] + f"{MARKERS[0]}\n\n{body}\n\n" + text[end:]


def main() -> None:
    """Writes the pages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that has the pages")
    args = parser.parse_args()
    report = json.loads(args.results.read_text())
    for page, make in PAGES.items():
        path = args.root / page
        path.write_text(written(path.read_text(), make(report)))


if __name__ == "__main__":
    main()
