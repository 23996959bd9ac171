"""Times a whole `optimizer.step()`: on the device, on the host, and against the copy bandwidth.

    python benchmarks/step_time.py --layout llama1b --dtype bfloat16 --device cuda
    python benchmarks/step_time.py --layout gpt2 --only "torch fused" --only AdamW8bit
    python benchmarks/step_time.py --layout cpu50m --dtype float32 --device cpu

Bytes are those a step must move: parameter, gradient and state read, parameter and state written.
The copy bandwidth is measured in the same run and counts bytes read and written. "device" is the
median between CUDA events around a step whose launches the host has queued before (so the host is
not in it, unless the optimizer waits for the device), "host" the median time until `step()`
returns, "whole" the median until the device is done; on a CPU all three are the same. Temporary
memory is what torch's allocator had at most during a step on a GPU, and on Linux's CPUs by how much
the process grew; "first" is the seconds that the first step took, building included (with an
empty XDG_CACHE_HOME, as on a new machine). Results are printed and written as JSON.
"""

import argparse
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from contestants import Make, contestants
from layouts import LAYOUTS

from optstate_codecs.memory import state_bytes

RESULTS = Path(__file__).parent / "results"


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(device: torch.device, call: Any, repeats: int) -> tuple[float, float, float]:
    """Medians: on the device, until the call returned, until the device was done."""
    inside, host, whole = [], [], []
    for _ in range(repeats):
        synchronize(device)
        begin = perf_counter()
        call()
        host.append(1e3 * (perf_counter() - begin))
        synchronize(device)
        whole.append(1e3 * (perf_counter() - begin))
    for _ in range(repeats if device.type == "cuda" else 0):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        # the device sleeps until the host has launched everything
        torch.cuda._sleep(int(2.5e6 * (median(host) + 0.2)))
        events[0].record()
        call()
        events[1].record()
        synchronize(device)
        inside.append(events[0].elapsed_time(events[1]))
    return median(inside or whole), median(host), median(whole)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(1 << (29 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    time, _, _ = milliseconds(device, lambda: target.copy_(source), 10)
    return 2 * source.nbytes / time * 1e3


def resident(key: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since its peak was forgotten."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status: no {key}")


def temporary_bytes(device: torch.device, step: Any) -> int | None:
    """What a step needs besides parameters, gradients and state; None where that is unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = resident("VmRSS")
        step()
        return max(0, resident("VmHWM") - before)
    except OSError:
        return None


def processor(device: torch.device) -> str:
    """What does the arithmetic."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return f"cpu: {len(models)} x {models[0]}"
    except (OSError, IndexError):
        return "cpu"


def surroundings(device: torch.device, repeats: int, bandwidth: float) -> dict[str, Any]:
    """When and on what a result was measured."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": processor(device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "repeats": repeats,
        "copy_bandwidth_gb_s": bandwidth / 1e9,
    }


def measure(
    make: Make, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device, n: int
) -> dict[str, Any]:
    """One row: times, bytes, temporary memory."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        data = torch.randn(shape, device=device, generator=generator).to(dtype)
        params.append(torch.nn.Parameter(data))
        params[-1].grad = torch.randn(shape, device=device, generator=generator).to(dtype)
    optimizer = make(params, lr=1e-3)
    begin = perf_counter()
    optimizer.step()
    synchronize(device)
    first = perf_counter() - begin
    milliseconds(device, optimizer.step, 3)
    temporary = temporary_bytes(device, optimizer.step)
    times = milliseconds(device, optimizer.step, n)
    numel = sum(p.numel() for p in params)
    state = state_bytes(optimizer)
    moved = sum(3 * p.nbytes for p in params) + 2 * state
    return {
        "device_ms": times[0],
        "host_ms": times[1],
        "whole_ms": times[2],
        "first_step_s": first,
        "bytes_per_parameter": moved / numel,
        "state_bits_per_parameter": 8 * state / numel,
        "moved_bytes": moved,
        "temporary_bytes": temporary,
        "parameters": numel,
        "tensors": len(params),
    }


def main() -> None:
    """Measures every chosen optimizer on every chosen layout and dtype."""
    available = contestants()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--only", choices=available, action="append", help="repeatable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "step_time.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device)
    report: dict[str, Any] = {
        **surroundings(device, args.repeats, bandwidth),
        "versions": {name: version for name, (_, version) in available.items()},
        "rows": [],
    }
    print(f"{report['device']}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s")
    print(f"{'':22}{'layout':10}{'dtype':9}  device    host   whole     B/p  share  temp  first")
    for layout in args.layout or ["gpt2"]:
        for dtype in args.dtype or ["bfloat16"]:
            for name in args.only or available:
                key = {"optimizer": name, "layout": layout, "dtype": dtype}
                try:
                    row = measure(
                        available[name][0],
                        LAYOUTS[layout](),
                        getattr(torch, dtype),
                        device,
                        args.repeats,
                    )
                except Exception as error:  # a peer's failure is a result, not the end of the run
                    report["rows"].append({**key, "error": repr(error)[:300]})
                    print(f"{name:22}{layout:10}{dtype:9}  {repr(error)[:80]}")
                    continue
                finally:
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                share = row["moved_bytes"] / row["device_ms"] * 1e3 / bandwidth
                report["rows"].append({**key, **row, "copy_share": share})
                print(
                    f"{name:22}{layout:10}{dtype:9}{row['device_ms']:8.3f}{row['host_ms']:8.3f}"
                    f"{row['whole_ms']:8.3f}{row['bytes_per_parameter']:8.2f}{100 * share:6.1f}%"
                    f"{(row['temporary_bytes'] or 0) / 2**20:6.1f}{row['first_step_s']:7.2f}",
                    flush=True,
                )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
