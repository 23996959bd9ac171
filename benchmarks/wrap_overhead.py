"""The cost of wrapping: milliseconds of a step beside those of the plain optimizer.

    python benchmarks/wrap_overhead.py
    python benchmarks/wrap_overhead.py --device cuda --layers 72

50 million parameters in tensors of a language model's sizes; medians of alternating steps, and what
a step needs beside parameters, gradients and state (on a GPU).
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

from optstate_codecs import state_bytes
from optstate_wrap import (
    ConfigurablePolicy,
    OptimizerWrapper,
    make_low_memory_policy,
    wrap,
    wrap_low_memory_adamw,
    wrap_max_compression_adamw,
)

RESULTS = Path(__file__).parent / "results"
WIDTH, LAYERS, VOCABULARY = 512, 12, 24_000


def shapes(layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Of a language model's tensors."""
    layer = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH,)]
    return [(vocabulary, WIDTH), *(shape for _ in range(layers) for shape in layer)]


def params(of: list[tuple[int, ...]], device: str) -> list[Parameter]:
    """Parameters of those shapes, with gradients."""
    made = [Parameter(torch.randn(shape, device=device)) for shape in of]
    for param in made:
        param.grad = torch.randn_like(param)
    return made


def timed(optimizer: Optimizer, device: str) -> tuple[float, int]:
    """Seconds of a step, and temporary bytes."""
    if device == "cpu":
        began = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - began, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    began = time.perf_counter()
    optimizer.step()
    torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() - held


def bits(optimizer: Optimizer, numel: int) -> float:
    """Bits of state for each parameter."""
    wrapped = isinstance(optimizer, OptimizerWrapper)
    size = optimizer.memory_report().state_bytes if wrapped else state_bytes(optimizer)
    return 8 * size / numel


ADAMW, EXACT = torch.optim.AdamW, ConfigurablePolicy({})
INT8 = ConfigurablePolicy({"exp_avg": "int8"})
CONTESTANTS: dict[str, Callable[[list[Parameter]], Optimizer]] = {
    "AdamW": ADAMW,
    "exact wrap": lambda p: wrap(ADAMW(p), EXACT),
    "int8 momentum": lambda p: wrap(ADAMW(p), INT8),
    "low memory": lambda p: wrap_low_memory_adamw(p, warmup_steps=0),
    "low memory, decoded": lambda p: wrap(ADAMW(p), make_low_memory_policy(0), fused=False),
    "max compression": wrap_max_compression_adamw,
    "AdamW fused": lambda p: ADAMW(p, fused=True),
    "exact wrap, fused": lambda p: wrap(ADAMW(p, fused=True), EXACT),
}
#: what each is measured in turns with
PAIRS = {
    "AdamW": (
        "exact wrap",
        "int8 momentum",
        "low memory",
        "low memory, decoded",
        "max compression",
    ),
    "AdamW fused": ("exact wrap, fused",),
}


def main() -> None:
    """Measure, print, and keep if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="results/wrap_overhead_DEVICE.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    arguments = parser.parse_args()
    of = shapes(arguments.layers, arguments.vocabulary)
    device, numel = arguments.device, sum(torch.Size(shape).numel() for shape in of)
    spent: dict[str, list[float]] = {}
    rooms: dict[str, int] = {}
    states: dict[str, float] = {}
    for base, names in PAIRS.items():
        made = {name: CONTESTANTS[name](params(of, device)) for name in (base, *names)}
        for step in range(arguments.steps + 3):
            for name, optimizer in made.items():
                seconds, rooms[name] = timed(optimizer, device)
                if step > 2:
                    spent.setdefault(name, []).append(seconds)
        states |= {name: bits(optimizer, numel) for name, optimizer in made.items()}
        del made, optimizer
    rows = []
    for base, names in PAIRS.items():
        for name in (base, *names):
            ms = 1e3 * statistics.median(spent[name])
            times = ms / (1e3 * statistics.median(spent[base]))
            rows.append(
                {
                    "optimizer": name,
                    "ms": round(ms, 2),
                    "times": round(times, 2),
                    "state_bits_per_parameter": round(states[name], 2),
                    "temporary_mib": round(rooms[name] / 2**20, 1),
                }
            )
            print(
                f"{name:24} {ms:8.2f} ms {times:6.2f} x {base:12} {states[name]:6.2f} bits "
                f"{rooms[name] / 2**20:8.1f} MiB"
            )
    setup = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": numel,
        "steps": arguments.steps,
    }
    out = arguments.out or RESULTS / f"wrap_overhead_{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
