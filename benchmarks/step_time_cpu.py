"""Times `optimizer.step()` on a CPU beside torch's fused AdamW, for models of many sizes.

    python benchmarks/step_time_cpu.py
    python benchmarks/step_time_cpu.py --size 1e6 --threads 1 --only AdamW8bit

A model of n parameters has four matrices of n / 4. All optimizers step the same parameters in turn,
round after round, so that other work on the machine slows all of them. "ms" and "ms_least" are the
median and the least of the rounds. "ratio" is the median of a time over that of torch's
fused AdamW in the same round, and "ratio_least" the ratio of the least times. Kernels are required
(`OPTSTATE_BACKEND=compile`). "first_step_s" is the first step: it traces the kernel, and builds it
unless an earlier row has. Results are printed and written as JSON.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from optstate.bench.contestants import contestants
from optstate.bench.timing import copy_bandwidth, surroundings

RESULTS = Path(__file__).parent / "results"

BASE = "torch fused"
NAMES = ("AdamW8bit", "AdamWFp8", "AdamW4bit", "TurboAdam", "TurboAdam 2 + 3", "TurboAdam 3 + 4")
NAMES += ("Lion8bit", "SGD8bit", "stochbf16 AdamW", "stochbf16 centred", "stochbf16 Lion")
NAMES += ("codecs fp32", "TurboAdam 2 + 3, flush")
SIZES = (1e4, 1e5, 1e6, 1e7, 1e8)


def parameters(size: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Four matrices with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(4):
        shape = (max(1, size // 256), 64)
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        param.grad = torch.randn(shape, generator=generator).to(dtype)
        params.append(param)
    return params


def measure(
    names: list[str], size: int, dtype: torch.dtype, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """One row an optimizer: up to ``rounds`` rounds, at least five, in about ``seconds``."""
    available = contestants()
    params = parameters(size, dtype)
    optimizers, first = {}, {}
    for name in (BASE, *names):
        optimizers[name] = available[name][0](params, lr=1e-4)
        begin = perf_counter()
        optimizers[name].step()
        first[name] = perf_counter() - begin
        optimizers[name].step()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    end = perf_counter() + seconds
    while len(times[BASE]) < 5 or (len(times[BASE]) < rounds and perf_counter() < end):
        for name, optimizer in optimizers.items():
            begin = perf_counter()
            optimizer.step()
            times[name].append(1e3 * (perf_counter() - begin))
    rows = []
    for name, spent in times.items():
        ratios = [ours / base for ours, base in zip(spent, times[BASE], strict=True)]
        rows.append(
            {
                "optimizer": name,
                "parameters": sum(p.numel() for p in params),
                "dtype": str(dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "rounds": len(spent),
                "ms": median(spent),
                "ms_least": min(spent),
                "ratio": median(ratios),
                "ratio_least": min(spent) / min(times[BASE]),
                "first_step_s": first[name],
            }
        )
    return rows


def main() -> None:
    """Measures every chosen optimizer at every chosen size, dtype and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, action="append", help="parameters; repeatable")
    parser.add_argument("--threads", type=int, action="append", help="repeatable")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--only", choices=NAMES, action="append", help="repeatable")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds for a size")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_time_cpu.json")
    args = parser.parse_args()
    os.environ["OPTSTATE_BACKEND"] = "compile"
    names = list(args.only or NAMES)
    cpu = torch.device("cpu")
    report: dict[str, Any] = {**surroundings(cpu, args.rounds, copy_bandwidth(cpu)), "rows": []}
    report |= {"torch_capability": torch.backends.cpu.get_cpu_capability()}
    for threads in args.threads or (1, 2):
        torch.set_num_threads(threads)
        for size in args.size or SIZES:
            for dtype in args.dtype or ("float32", "bfloat16"):
                rows = measure(names, int(size), getattr(torch, dtype), args.rounds, args.seconds)
                report["rows"] += rows
                print(f"{threads} threads, {int(size)} parameters, {dtype}")
                for row in rows:
                    print(
                        f"    {row['optimizer']:20}{row['ms']:10.3f} ms{row['ratio']:7.2f} x, least"
                        f"{row['ms_least']:10.3f} ms{row['ratio_least']:7.2f} x"
                        f"{row['first_step_s']:8.2f} s",
                        flush=True,
                    )
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
