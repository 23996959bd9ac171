"""Times optimizer steps and training steps of a model sharded by FSDP2, one process a GPU.

    python benchmarks/fsdp.py --workers 2
    python benchmarks/fsdp.py --workers 2 --device cpu --small

`train` trains 1.1e9 parameters of Llama's kind in bfloat16: the median milliseconds of a training
step and of `optimizer.step()` until the device is done, and the peak memory of the first worker's
GPU. `host` steps 200 small DTensors: the median microseconds until `step()` returns. torch's fused
AdamW is in the same run. Results are printed and written as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from llama import CONFIGS, Llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lowbit_adam import AdamW4bit, AdamW8bit
from optstate.bench.timing import copy_bandwidth, surroundings, synchronize
from optstate_codecs.memory import state_bytes
from turboadam import TurboAdam

RESULTS = Path(__file__).parent / "results" / "fsdp_h100x2.json"
Make = Callable[[Any], Optimizer]


def contestants(device: torch.device) -> dict[str, Make]:
    """Every optimizer that is timed."""
    fused = device.type == "cuda"
    return {
        "torch AdamW" + ", fused" * fused: partial(torch.optim.AdamW, lr=1e-4, fused=fused or None),
        "AdamW8bit": partial(AdamW8bit, lr=1e-4),
        "AdamW4bit": partial(AdamW4bit, lr=1e-4),
        'TurboAdam(mode="adamw")': partial(TurboAdam, lr=1e-4, mode="adamw"),
        "TurboAdam": partial(TurboAdam, lr=1e-4),
    }


def train(make: Make, device: torch.device, small: bool, repeats: int) -> dict[str, Any]:
    """One optimizer's training steps."""
    torch.manual_seed(0)
    config = CONFIGS["tiny" if small else "1b"]
    # FSDP's modules refer to each other in circles
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = Llama(config, device, torch.float32 if small else torch.bfloat16)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = make(model.parameters())
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (1, 16) if small else (2, 2048)
    tokens = torch.randint(config.vocabulary, shape, generator=generator).to(device)
    steps, whole = [], []
    for number in range(repeats + 2):
        synchronize(device)
        begin = perf_counter()
        model.zero_grad(set_to_none=True)
        model(tokens).backward()
        synchronize(device)
        middle = perf_counter()
        optimizer.step()
        synchronize(device)
        if number > 1:
            steps.append(1e3 * (perf_counter() - middle))
            whole.append(1e3 * (perf_counter() - begin))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "parameters": sum(param.numel() for param in model.parameters()),
        "step_ms": median(steps),
        "train_ms": median(whole),
        "peak_bytes": peak,
        "state_bytes": state_bytes(optimizer),
    }


def host(make: Make, device: torch.device, repeats: int) -> float:
    """Microseconds until ``step()`` of 200 DTensors of 64 x 64 returns."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    value = torch.ones(64, 64, device=device)
    params = [Parameter(distribute_tensor(value, mesh, [Shard(0)])) for _ in range(200)]
    for param in params:
        param.grad = distribute_tensor(value, mesh, [Shard(0)])
    optimizer, times = make(params), []
    for _ in range(repeats + 3):
        synchronize(device)
        begin = perf_counter()
        optimizer.step()
        times.append(1e6 * (perf_counter() - begin))
    return median(times[3:])


def work(rank: int, workers: int, store: str, args: argparse.Namespace) -> None:
    """One process."""
    device = torch.device(args.device, rank if args.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=workers)
    rows = []
    for name, make in contestants(device).items():
        row = {"optimizer": name, "host_us": host(make, device, args.repeats)}
        row |= train(make, device, args.small, args.repeats)
        rows.append(row)
        if rank == 0:
            print(
                f"{name:20} host {row['host_us']:7.0f} us   step {row['step_ms']:7.2f} ms   "
                f"training step {row['train_ms']:7.1f} ms   peak {row['peak_bytes'] / 1e9:6.2f} GB"
            )
    if rank == 0:
        setup = surroundings(device, args.repeats, copy_bandwidth(device))
        report = {"setup": {**setup, "workers": workers}, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Starts a process for each worker."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="to try the benchmark itself")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        mp.spawn(work, (args.workers, store, args), nprocs=args.workers)


if __name__ == "__main__":
    main()
