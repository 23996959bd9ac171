"""The time of a step with offloaded state, beside the bus's time for the bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from layouts import LAYOUTS, Shapes
from offload_common import (
    Contestant,
    Sizes,
    allocated,
    clean,
    contestants,
    forget_peak,
    host_bytes,
    moved_bytes,
    process_bytes,
    reserved,
    unhook,
)
from torch.nn import Parameter
from torch.optim import Optimizer

from lowbit_adam import AdamW8bit
from optstate.bench.timing import synchronize
from optstate.process import forget_resident_peak
from optstate_codecs import offload


def tensors(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[Parameter]:
    """Random parameters with random gradients."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for shape in shapes:
        made.append(Parameter(torch.randn(shape, dtype=dtype, device=device, generator=generator)))
        made[-1].grad = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return made


def stepper(optimizer: Optimizer, params: Sequence[Parameter]) -> Callable[[], None]:
    """A step, from gradients on the device to parameters on the device."""
    if not hasattr(optimizer, "param_d2h_map"):
        return optimizer.step  # type: ignore[return-value]
    # it takes gradients to the host in hooks of the backward pass, last parameter first
    grads = [param.grad for param in params]

    def copy_and_step() -> None:
        for param, grad in zip(reversed(params), reversed(grads), strict=True):
            param.grad = grad
            for hook in (param._post_accumulate_grad_hooks or {}).values():
                hook(param)
        optimizer.step()

    return copy_and_step


def windows(
    step: Callable[[], None], device: torch.device, count: int, steps: int
) -> tuple[float, float]:
    """Median milliseconds of one of several steps, and until the first one has been issued."""
    spent, issued = [], []
    for _ in range(count):
        synchronize(device)
        begin = perf_counter()
        step()
        issued.append(1e3 * (perf_counter() - begin))
        for _ in range(steps - 1):
            step()
        synchronize(device)
        spent.append(1e3 * (perf_counter() - begin) / steps)
    return median(spent), median(issued)


def without_waiting(step: Callable[[], None], device: torch.device) -> str | bool | None:
    """Whether a step never waits for the device; otherwise torch's error."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return repr(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def measure(
    one: Contestant, shapes: Shapes, dtype: torch.dtype, sizes: Sizes, both_ways: float
) -> dict[str, Any]:
    """The results of one contestant."""
    device = sizes.device
    params = tensors(shapes, dtype, device)
    synchronize(device)
    held, room, process = allocated(device), reserved(device), process_bytes()
    numel = sum(param.numel() for param in params)
    forget_peak(device)
    forget_resident_peak()
    begin = perf_counter()
    optimizer = one.make(params, sizes)
    step = stepper(optimizer, params)
    step()
    synchronize(device)
    first = perf_counter() - begin
    first_peak = allocated(device, True) - held
    process_peak = process_bytes(True) - process
    for _ in range(2):
        step()
    synchronize(device)
    forget_peak(device)
    ms, issued = windows(step, device, *((2, 2) if sizes.small else (5, 4)))
    row: dict[str, Any] = {
        "ms": ms,
        "issued_ms": issued,
        "first_s": first,
        "extra_device_bytes": allocated(device, True) - held,
        "extra_device_bytes_first_step": first_peak,
        "extra_reserved_bytes": reserved(device) - room,
        "host_bytes_per_parameter": host_bytes(optimizer) / numel,
        "process_bytes_per_parameter": (process_bytes() - process) / numel,
        "process_bytes_per_parameter_first_step": process_peak / numel,
        "parameters": numel,
        "tensors": len(params),
    }
    if moved := moved_bytes(optimizer):
        floor = 1e3 * moved / both_ways
        row |= {"bytes_each_way": moved, "floor_ms": floor, "times_floor": ms / floor}
    if one.store != "cpu":
        row["without_waiting"] = without_waiting(step, device)
    unhook(params)
    return row


def run_step(sizes: Sizes, link: dict[str, float], only: list[str], dtypes: list[str]) -> list[Any]:
    """Results of every contestant with each of its dtypes."""
    shapes = LAYOUTS["tiny" if sizes.small else "llama1b"]()
    rows: list[dict[str, Any]] = []
    print(f"{'step':37}{'dtype':10}      ms  issued   floor  ratio  extra  host B/p  waits")
    for one in contestants().values():
        for dtype in one.dtypes:
            if (only and one.name not in only) or (dtypes and dtype not in dtypes):
                continue
            key = {"optimizer": one.name, "dtype": dtype, "place": one.store}
            with clean(sizes.device):
                try:
                    row = measure(one, shapes, getattr(torch, dtype), sizes, link["both"])
                except Exception as error:  # a failure is a result, not the end of the run
                    row = {"error": repr(error)[:500]}
            rows.append({**key, **row})
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of results as text."""
    begin = f"{row['optimizer']:37}{row['dtype']:10}"
    if "error" in row:
        return begin + row["error"][:80]
    waits = {True: "no", None: "?"}.get(row.get("without_waiting"), "yes")
    return (
        f"{begin}{row['ms']:8.2f}{row['issued_ms']:8.2f}{row.get('floor_ms', 0):8.2f}"
        f"{row.get('times_floor', 0):7.2f}{row['extra_device_bytes'] / 2**20:7.0f}"
        f"{row['host_bytes_per_parameter']:10.2f}  {waits}"
    )


def run_disk(sizes: Sizes, folder: Path | None) -> list[Any]:
    """AdamW8bit of 200 million parameters with its state in a file, which the system may cache."""
    shapes = LAYOUTS["tiny"]() if sizes.small else LAYOUTS["llama1b"]()[: 1 + 3 * 9]
    rows = []
    for sync in (False, True):
        with clean(sizes.device), tempfile.TemporaryDirectory(dir=folder) as inside:
            try:
                row = disk_row(shapes, sizes, Path(inside) / "state", sync)
                print(
                    f"disk, sync={sync}: {row['ms']:.1f} ms a step, "
                    f"{row['bytes_each_way'] / row['ms'] / 1e6:.2f} GB/s each way",
                    flush=True,
                )
            except Exception as error:
                row = {"error": repr(error)[:500]}
                print(f"disk, sync={sync}: {row['error'][:120]}", flush=True)
            rows.append({"optimizer": "int8 on disk", "sync": sync, **row})
    return rows


def disk_row(shapes: Shapes, sizes: Sizes, path: Path, sync: bool) -> dict[str, Any]:
    """Milliseconds of one of several steps, until the file has all of its state."""
    params = tensors(shapes, torch.bfloat16, sizes.device)
    made = AdamW8bit(params, lr=1e-3)
    optimizer = offload(made, "disk", path=path, sync=sync, chunk_bytes=sizes.chunk_bytes)
    spent, steps = [], 2 if sizes.small else 5
    for count in range(4):
        begin = perf_counter()
        for _ in range(steps):
            optimizer.step()
        _ = optimizer.state  # waits until all is stored
        synchronize(sizes.device)
        if count:
            spent.append(1e3 * (perf_counter() - begin) / steps)
    moved, ms = moved_bytes(optimizer), median(spent)
    numel = sum(param.numel() for param in params)
    return {
        "ms": ms,
        "bytes_each_way": moved,
        "gb_s_each_way": moved / ms / 1e6,
        "file_bytes_per_parameter": path.stat().st_size / numel,
        "parameters": numel,
    }
