"""Times calls on a device, and measures its copy bandwidth and temporary memory."""

import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from optstate.process import forget_resident_peak, resident_bytes


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    device: torch.device, call: Callable[[], Any], repeats: int
) -> tuple[float, float, float]:
    """Medians of a call's times: on the device, until it returned, until the device was done.

    On a CPU all three are the same but for the clock. On a GPU the first is the time between CUDA
    events around a call whose launches the host has queued before.
    """
    inside, host, whole = [], [], []
    for _ in range(repeats):
        synchronize(device)
        begin = perf_counter()
        call()
        host.append(1e3 * (perf_counter() - begin))
        synchronize(device)
        whole.append(1e3 * (perf_counter() - begin))
    for _ in range(repeats if device.type == "cuda" else 0):
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        # the device sleeps until the host has launched everything
        torch.cuda._sleep(int(2.5e6 * (median(host) + 0.2)))  # type: ignore[no-untyped-call]
        events[0].record()
        call()
        events[1].record()
        synchronize(device)
        inside.append(events[0].elapsed_time(events[1]))
    return median(inside or whole), median(host), median(whole)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    numel = 1 << (29 if device.type == "cuda" else 25)
    source = torch.randn(numel, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    time, _, _ = milliseconds(device, lambda: target.copy_(source), 10)
    return 2 * source.nbytes / time * 1e3


def temporary_bytes(device: torch.device, step: Callable[[], Any]) -> int | None:
    """What a step needs besides parameters, gradients and state; None where that is unknown.

    On a GPU, what torch's allocator had at most; on a CPU, by how much the process grew.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    forgotten, resident = forget_resident_peak(), resident_bytes()
    if not forgotten or resident is None:
        return None
    step()
    return max(0, (resident_bytes(peak=True) or 0) - resident)


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
