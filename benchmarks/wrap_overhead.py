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


def shapes() -> list[tuple[int, ...]]:
    """Of a language model's tensors."""
    layer = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH,)]
    return [(VOCABULARY, WIDTH), *(shape for _ in range(LAYERS) for shape in layer)]


def params() -> list[Parameter]:
    """Parameters of those shapes, with gradients."""
    made = [Parameter(torch.randn(shape)) for shape in shapes()]
    for param in made:
        param.grad = torch.randn_like(param)
    return made


def contestants() -> dict[str, Callable[[], Optimizer]]:
    """What makes each optimizer, by its name."""
    adamw, exact = torch.optim.AdamW, ConfigurablePolicy({})
    return {
        "AdamW": lambda: adamw(params()),
        "AdamW, exact wrap": lambda: wrap(adamw(params()), exact),
        "AdamW fused": lambda: adamw(params(), fused=True),
        "AdamW fused, exact wrap": lambda: wrap(adamw(params(), fused=True), exact),
        "low memory": lambda: wrap_low_memory_adamw(params(), warmup_steps=0),
        "max compression": lambda: wrap_max_compression_adamw(params()),
    }


def main() -> None:
    """Measure, print, and keep if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    made = {n: f() for n, f in contestants().items() if not arguments.only or n in arguments.only}
    spent: dict[str, list[float]] = {name: [] for name in made}
    for step in range(arguments.steps + 1):
        for name, optimizer in made.items():
            began = time.perf_counter()
            optimizer.step()
            if step:
                spent[name].append(time.perf_counter() - began)
    found = {name: statistics.median(times) for name, times in spent.items()}
    for name, seconds in found.items():
        base = "AdamW fused" if "fused" in name else "AdamW"
        print(f"{name:28} {1e3 * seconds:8.1f} ms   {seconds / found.get(base, seconds):.2f} x")
    if arguments.write:
        total = sum(torch.Size(shape).numel() for shape in shapes())
        record = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "parameters": total,
        }
        RESULTS.write_text(json.dumps({**record, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
