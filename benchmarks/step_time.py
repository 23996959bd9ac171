"""Times `optimizer.step()` on one square layer and counts its state.

A row a combination of optimizer and size: the 20th, 50th and 80th percentile in milliseconds over
repeated steps with the same gradient, after a warm-up. Rows are appended to a CSV file.

    python benchmarks/step_time.py --size 1024 --size 4096 --device cuda
"""

import argparse
import csv
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from platform import machine, python_version
from time import perf_counter

import torch

import lowbit_adam
from optstate_codecs.memory import state_bytes

RESULTS = Path(__file__).parent / "results" / "step_time.csv"
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.optim.AdamW": torch.optim.AdamW,
    "torch.optim.AdamW(fused=True)": partial(torch.optim.AdamW, fused=True),
    "lowbit_adam.AdamW8bit": lowbit_adam.AdamW8bit,
    "lowbit_adam.AdamW8bit(block_size=256)": partial(lowbit_adam.AdamW8bit, block_size=256),
}


def step_times(optimizer: torch.optim.Optimizer, device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each step; a GPU is waited for before the clock is read."""
    times = []
    for _ in range(repeats):
        begin = perf_counter()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (perf_counter() - begin))
    return times


def measure(name: str, size: int, device: torch.device, repeats: int) -> dict[str, object]:
    """One row of the results."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(size, size, device=device, generator=generator))
    weight.grad = torch.randn(size, size, device=device, generator=generator)
    optimizer = OPTIMIZERS[name]([weight])
    step_times(optimizer, device, max(1, repeats // 5))
    times = torch.tensor(step_times(optimizer, device, repeats))
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "optimizer": name,
        "size": size,
        "p20_ms": f"{p20:.4f}",
        "p50_ms": f"{p50:.4f}",
        "p80_ms": f"{p80:.4f}",
        "state_bytes_per_parameter": f"{state_bytes(optimizer) / weight.numel():.5f}",
        "repeats": repeats,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine(),
        "threads": torch.get_num_threads(),
        "python": python_version(),
        "torch": torch.__version__,
        "lowbit_adam": lowbit_adam.__version__,
    }


def main() -> None:
    """Measures every combination and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, action="append", help="rows and columns; repeatable")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, action="append", help="repeatable")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV to append to")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = None
        for size in args.size or (256, 1024, 2048):
            for name in args.optimizer or OPTIMIZERS:
                row = measure(name, size, torch.device(args.device), args.repeats)
                if writer is None:
                    writer = csv.DictWriter(file, row)
                    if new:
                        writer.writeheader()
                writer.writerow(row)
                print(
                    f"{size:5} {name:40} {row['p50_ms']:>9} ms"
                    f" {row['state_bytes_per_parameter']:>9} bytes/parameter"
                )


if __name__ == "__main__":
    main()
