"""Times of optimizer steps and training steps with state in host memory or in a file.

    python benchmarks/offload.py step train finetune7b disk
    python benchmarks/offload.py step --only "int8 offloaded" --chunk-mib 16
    python benchmarks/offload.py step train finetune7b disk --small --device cpu

`step` steps 1.1e9 parameters with every format offloaded, beside the floor: the bytes of state over
the bus's bandwidth each way while both ways run, measured just before. For comparison it steps
optimizers with resident state, and torchao's, which steps on the CPU. Its time begins when
gradients are ready on the device, which its hooks copy to the host, and ends with parameters there.
Milliseconds are those of one of several steps without waits; "issued" is until the first returned.
`train` trains a model of as many parameters on 4,096 and 8,192 tokens a step; milliseconds are from
one step's end to the next's, without waits between; "released" steps during the backward pass.
`finetune7b` trains 6.7e9 parameters and compares the peak memory with that of a run without an
optimizer. `disk` steps 200 million parameters whose state is in a file, which the system may cache.
Each part is measured anew and replaces its results in the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from offload_common import FORMATS, Sizes, bus, contestants
from offload_step import run_disk, run_step
from offload_train import run_finetune, run_train

from optstate.bench.timing import surroundings
from optstate_codecs import __version__
from optstate_codecs.offloading import CHUNK_BYTES

RESULTS = Path(__file__).parent / "results" / "offload_h200.json"
PARTS = ("step", "train", "finetune7b", "disk")


def versions() -> dict[str, str]:
    """Of what is measured."""
    found = {"optstate-codecs": __version__}
    for name in ("torchao", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Measures the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", default=[])
    everyone = ("no optimizer", *contestants())
    parser.add_argument("--only", choices=everyone, action="append", default=[], help="repeatable")
    parser.add_argument(
        "--chunk-mib",
        type=float,
        default=CHUNK_BYTES / 2**20,
        help="of state that moves at a time",
    )
    parser.add_argument("--format", choices=FORMATS, default="int8", help="of finetune7b")
    parser.add_argument("--path", type=Path, help="folder for disk's file")
    parser.add_argument("--small", action="store_true", help="to try the benchmark itself")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    chunk = 1 << 12 if args.small else int(args.chunk_mib * 2**20)
    sizes = Sizes(device, chunk, args.small)
    link = bus(sizes)
    print(
        f"torch {torch.__version__}, {device}, pinned GB/s: {link['to_device'] / 1e9:.1f} to the "
        f"device, {link['to_host'] / 1e9:.1f} to the host, {link['both'] / 1e9:.1f} both ways each"
    )
    setup: dict[str, Any] = surroundings(device, 0, 0.0)
    setup = {key: setup[key] for key in setup if key not in ("repeats", "copy_bandwidth_gb_s")}
    setup |= {
        "cpus": os.cpu_count(),
        "chunk_bytes": chunk,
        "versions": versions(),
        "bus_gb_s": {key: value / 1e9 for key, value in link.items()},
    }
    measure = {
        "step": lambda: run_step(sizes, link, args.only, args.dtype),
        "train": lambda: run_train(sizes, args.only),
        "finetune7b": lambda: run_finetune(sizes, args.format),
        "disk": lambda: run_disk(sizes, args.path),
    }
    for part in args.parts:
        result = {"setup": setup, "result": measure[part]()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps({**report, part: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
