"""Times the host's side of `optimizer.step()` on every layout, beside torch's fused AdamW.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --layout gpt2 --only AdamW8bit --dtype float32

"same" is with gradients that stay where they are, "moved" with gradients at other addresses in each
step, as two micro-batches of different lengths may leave them. Microseconds until `step()` returns,
the median and the fastest of `--repeats` steps with an idle device before each; "a tensor" is the
median over tensors, "ratio" over torch's median. Results are printed and written as JSON.
"""

import argparse
import gc
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from layouts import LAYOUTS
from step_time import RESULTS

from optstate.bench.contestants import Make, contestants
from optstate.bench.timing import surroundings, synchronize

BASE = "torch fused"
OURS = ("AdamW8bit", "AdamW4bit", "TurboAdam", "TurboAdam 2 + 3, flush", "stochbf16 AdamW")
# sets of gradients that take turns
SETS = {"same": 1, "moved": 2}


def host_times(
    make: Make, layout: str, dtype: torch.dtype, device: torch.device, sets: int, repeats: int
) -> list[float]:
    """Seconds until each of ``repeats`` steps returned, after a few that are not counted."""
    params = [
        torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        for shape in LAYOUTS[layout]()
    ]
    # not zero: some formats take longer for zeros
    grads = [[torch.full_like(param, 0.01) for param in params] for _ in range(sets)]
    optimizer = make(params, lr=1e-3)
    found = []
    for step in range(repeats + 5):
        for param, grad in zip(params, grads[step % sets], strict=True):
            param.grad = grad
        synchronize(device)
        gc.disable()
        begin = perf_counter()
        optimizer.step()
        found.append(perf_counter() - begin)
        gc.enable()
    synchronize(device)
    return found[5:]


def main() -> None:
    """Measures every chosen optimizer on every chosen layout, torch's first."""
    available = contestants()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--only", choices=available, action="append", help="repeatable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS / "host_time.json")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows: list[dict[str, Any]] = []
    print(f"{'':18}{'layout':11}{'gradients':11}  median  fastest  a tensor  ratio")
    for layout in args.layout or LAYOUTS:
        for gradients, sets in SETS.items():
            base = 0.0
            for name in dict.fromkeys((BASE, *(args.only or OURS))):
                made = available[name][0]
                times = host_times(made, layout, dtype, device, sets, args.repeats)
                middle, tensors = 1e6 * median(times), len(LAYOUTS[layout]())
                base = base or middle
                row = {"optimizer": name, "layout": layout, "gradients": gradients}
                row |= {"median_us": middle, "fastest_us": 1e6 * min(times), "tensors": tensors}
                rows.append({**row, "ratio": middle / base})
                print(
                    f"{name:18}{layout:11}{gradients:11}{middle:8.0f} {1e6 * min(times):8.0f}"
                    f"{middle / tensors:10.2f}{middle / base:7.2f}",
                    flush=True,
                )
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    # no bandwidth is of interest here
    setup = surroundings(device, args.repeats, 0.0)
    del setup["copy_bandwidth_gb_s"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**setup, "dtype": args.dtype, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
