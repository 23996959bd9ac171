"""Computes which models fit on which GPUs, by the format and the store of optimizer state.

    python benchmarks/fits.py

Bytes, not trials: parameters, gradients and state of models of Llama's shapes, on torch's meta
device, state as its formats declare it. Written as JSON, and as tables into docs/what-fits.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from offload_common import FORMATS

from optstate.estimate.count import BUCKET, STORES, Counted, count, placed
from optstate.models.families import named_shapes
from optstate.models.model import Model
from optstate_codecs.offloading import CHUNK_BYTES
from optstate_codecs.offloading.copies import SLOTS
from optstate_codecs.offloading.ring import WAITING
from turboadam import TurboAdam

RESULTS = Path(__file__).parent / "results" / "fits.json"
PAGE = Path(__file__).parents[1] / "docs" / "what-fits.md"
MARKERS = ("<!-- written by benchmarks/fits.py -->", "<!-- end -->")
# the shapes of each, and its name in the tables
MODELS = {
    "1b": ("tinyllama-1.1b", "TinyLlama 1.1B"),
    "7b": ("llama-2-7b", "Llama 2 7B"),
    "8b": ("llama-3-8b", "Llama 3 8B"),
    "13b": ("llama-2-13b", "Llama 2 13B"),
    "70b": ("llama-2-70b", "Llama 2 70B"),
}
CARDS = (8, 16, 24, 32, 80)
# of a card, for activations and all else that is not counted
LEFT = 1_500_000_000
ADAMW = "TurboAdam, mode adamw"
OURS = {**FORMATS, ADAMW: partial(TurboAdam, mode="adamw"), "TurboAdam": TurboAdam}
NAMES = {"int8": "8-bit"}


def rows_of(model: str) -> Iterator[dict[str, Any]]:
    """The rows of a model."""
    bf16 = Model.of_shapes(model, named_shapes(MODELS[model][0]), torch.bfloat16)
    key = {"model": model, "parameters": bf16.parameters}
    # all in float32, which is how torch's has float32 state
    exact = count(bf16.in_dtype(torch.float32), torch.optim.AdamW)
    yield {**key, "format": "torch AdamW, all fp32", "place": "device"} | stored(exact, "device")
    for name, make in OURS.items():
        counted = count(bf16, make)
        for store in STORES:
            row = stored(counted, store)
            yield {**key, "format": NAMES.get(name, name), "place": store} | row


def stored(counted: Counted, store: str) -> dict[str, Any]:
    """Bytes on the device with all gradients and with few, on the host and in a file."""
    kept, released = placed(counted, store, False), placed(counted, store, True)
    device = {"all": kept.device, "released": released.device}
    return {
        "state_bytes": counted.stored,
        "device_bytes": kept.device,
        "device_bytes_released": released.device,
        "host_bytes": kept.host,
        "file_bytes": kept.file,
        "cards": {str(card): verdict(card, device) for card in CARDS},
    }


def verdict(card: int, device: dict[str, int]) -> str:
    """Whether the needed bytes leave enough of a card free."""
    room = card * 10**9 - LEFT
    if device["all"] <= room:
        return "yes"
    return "released" if device["released"] <= room else ""


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown, a table for each model."""
    return "\n\n".join(
        "\n".join(section(model, [row for row in report["rows"] if row["model"] == model]))
        for model in MODELS
    )


def gb(nbytes: int) -> str:
    """Gigabytes as text; empty for zero."""
    return f"{nbytes / 1e9:.1f}" if nbytes else ""


def section(model: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A model's table; disk and host are the same to the device."""
    yield f"## {MODELS[model][1]}: {rows[0]['parameters'] / 1e9:.2f} billion parameters\n"
    cards = " | ".join(f"{card} GB" for card in CARDS)
    yield f"| state | where | device GB | released | {cards} | RAM GB | or file GB |"
    yield "|---|---|" + "---|" * (len(CARDS) + 4)
    files = {row["format"]: row["file_bytes"] for row in rows if row["place"] == "disk"}
    for row in rows:
        if row["place"] == "disk":
            continue
        offloaded = row["place"] == "host"
        cells = [
            row["format"],
            "host or disk" if offloaded else "device",
            gb(row["device_bytes"]),
            gb(row["device_bytes_released"]),
            *(row["cards"][str(card)] for card in CARDS),
            gb(row["host_bytes"]),
            gb(files[row["format"]]) if offloaded else "",
        ]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Counts, and writes both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    report = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "left_bytes": LEFT,
        "bucket_bytes": BUCKET,
        "waiting_bytes": WAITING,
        "ring_bytes": SLOTS * CHUNK_BYTES,
        "rows": [row for model in MODELS for row in rows_of(model)],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    text = args.page.read_text()
    begin, end = (text.index(marker) for marker in MARKERS)
    body = f"{MARKERS[0]}\n\n{table(report)}\n\n"
    args.page.write_text(text[:begin] + body + text[end:])


if __name__ == "__main__":
    main()
