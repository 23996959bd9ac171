"""What an exact wrap costs on a CPU: seconds of a step beside those of the plain optimizer.

50 million parameters in tensors of a language model's sizes; medians of alternating steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate_wrap import (
    ConfigurablePolicy,
    wrap,
    wrap_low_memory_adamw,
    wrap_max_compression_adamw,
)

RESULTS = Path(__file__).parent / "results" / "wrap_overhead_cpu.json"
WIDTH, LAYERS, VOCABULARY = 512, 12, 24_000


def shapes(layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Of a language model's tensors."""
    layer = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH,)]
    return [(vocabulary, WIDTH), *(shape for _ in range(layers) for shape in layer)]


def params(of: list[tuple[int, ...]]) -> list[Parameter]:
    """Parameters of those shapes, with gradients."""
    made = [Parameter(torch.randn(shape)) for shape in of]
    for param in made:
        param.grad = torch.randn_like(param)
    return made


ADAMW, EXACT = torch.optim.AdamW, ConfigurablePolicy({})
CONTESTANTS: dict[str, Callable[[list[Parameter]], Optimizer]] = {
    "AdamW": ADAMW,
    "exact wrap": lambda p: wrap(ADAMW(p), EXACT),
    "low memory": lambda p: wrap_low_memory_adamw(p, warmup_steps=0),
    "max compression": wrap_max_compression_adamw,
    "AdamW fused": lambda p: ADAMW(p, fused=True),
    "exact wrap, fused": lambda p: wrap(ADAMW(p, fused=True), EXACT),
}
#: what each is measured in turns with
PAIRS = {
    "AdamW": ("exact wrap", "low memory", "max compression"),
    "AdamW fused": ("exact wrap, fused",),
}


def main() -> None:
    """Measure, print, and keep if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go, as JSON")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    arguments = parser.parse_args()
    of = shapes(arguments.layers, arguments.vocabulary)
    spent: dict[str, list[float]] = {}
    for base, names in PAIRS.items():
        made = {name: CONTESTANTS[name](params(of)) for name in (base, *names)}
        for step in range(arguments.steps + 2):
            for name, optimizer in made.items():
                began = time.perf_counter()
                optimizer.step()
                if step > 1:
                    spent.setdefault(name, []).append(time.perf_counter() - began)
    rows = []
    for base, names in PAIRS.items():
        for name in (base, *names):
            ms = 1e3 * statistics.median(spent[name])
            times = ms / (1e3 * statistics.median(spent[base]))
            rows.append({"optimizer": name, "ms": round(ms, 1), "times": round(times, 2)})
            print(f"{name:24} {ms:8.1f} ms {times:6.2f} x {base}")
    setup = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(torch.Size(shape).numel() for shape in of),
        "steps": arguments.steps,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
