"""Compares what `optstate estimate` says with the bytes that a step really allocates.

    python benchmarks/estimate_check.py --model gpt2 --device cpu
    python benchmarks/estimate_check.py --model llama-2-7b --model vit-h --device cuda

Parameters and gradients are made on the device, and an optimizer steps them twice. On a GPU the
measured bytes are the most that torch's allocator had in the second step, beyond what it had
before. On a CPU, where nothing counts allocations, they are the storages of parameters, gradients
and state. Host memory of offloaded state is counted over its slabs. Results are merged into the
JSON by model, and printed.
"""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from offload_common import host_bytes

from optstate.bench.timing import surroundings, synchronize
from optstate.estimate.count import count, placed
from optstate.models.families import NAMED
from optstate.models.model import Model
from optstate.models.sources import read_model
from optstate.optimizers import parse
from optstate_codecs import CodedOptimizer, memory_report, offload

RESULTS = Path(__file__).parent / "results"
OPTIMIZERS = ("torch.optim.AdamW(fused=true)", "AdamW8bit", "AdamW4bit", "TurboAdam")
MASTERS = "AdamW8bit(master_weight_bits=24)"


def allocated(device: torch.device, peak: bool = False) -> int:
    """Bytes that torch's allocator has on a GPU, or had at most."""
    if device.type != "cuda":
        return 0
    found = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
    return int(found(device))


def measured(model: Model, name: str, store: str, device: torch.device) -> dict[str, int]:
    """Bytes on the device and on the host in a step."""
    before = allocated(device)
    params = [
        torch.nn.Parameter(torch.ones(entry.shape, dtype=entry.dtype, device=device))
        for entry in model.trained
    ]
    optimizer = parse(name)(params, lr=1e-3)
    if store == "host":
        assert isinstance(optimizer, CodedOptimizer)
        offload(optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer.step()
    synchronize(device)
    report = memory_report(optimizer)
    on_device = report.parameter_bytes + report.gradient_bytes
    if store == "device":
        on_device += report.state_bytes
    if device.type == "cuda":
        on_device = allocated(device, peak=True) - before
    return {"device_bytes": on_device, "host_bytes": host_bytes(optimizer)}


def compare(model: Model, name: str, store: str, device: torch.device) -> dict[str, Any]:
    """A row: estimated and measured bytes, and how far the estimate is off."""
    counted = count(model, parse(name))
    where = placed(counted, store, released=False)
    # on a CPU offloaded state does not pass through other memory that could be counted
    transfer = where.transfer if device.type == "cuda" else 0
    estimated = {
        "device_bytes": where.device - where.transfer + transfer,
        "host_bytes": where.host,
    }
    found = measured(model, name, store, device)
    gc.collect()
    off = {
        key: estimated[key] / found[key] - 1 if found[key] else float(estimated[key] != 0)
        for key in estimated
    }
    return {"optimizer": name, "store": store, "estimated": estimated, "measured": found} | {
        "off": max(off.values(), key=abs)
    }


def main() -> None:
    """Compares every optimizer on every chosen model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=NAMED, action="append")
    parser.add_argument("--optimizer", action="append")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    out = args.out or RESULTS / f"estimate_{device.type}.json"
    report = json.loads(out.read_text()) if out.exists() else {}
    for name in args.model or ["gpt2"]:
        model = read_model(name)
        rows = []
        for optimizer in args.optimizer or [*OPTIMIZERS, MASTERS]:
            for store in ("device",) if optimizer.startswith("torch") else ("device", "host"):
                row = compare(model, optimizer, store, device)
                rows.append(row)
                print(
                    f"{name:12}{optimizer:34}{store:8}{row['estimated']['device_bytes'] / 1e9:8.3f}"
                    f"{row['measured']['device_bytes'] / 1e9:8.3f} GB, {row['off']:+.3%}",
                    flush=True,
                )
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        setup = surroundings(device, 1, 0.0)
        report[name] = {
            "setup": {key: setup[key] for key in ("time", "device", "python", "torch")},
            "parameters": model.parameters,
            "dtype": model.dtypes,
            "rows": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
