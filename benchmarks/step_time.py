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
from pathlib import Path
from typing import Any

import torch
from layouts import LAYOUTS

from optstate.bench.contestants import contestants
from optstate.bench.measure import measured
from optstate.bench.timing import copy_bandwidth, surroundings

RESULTS = Path(__file__).parent / "results"


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
                make, shapes = available[name][0], LAYOUTS[layout]()
                row = measured(make, shapes, getattr(torch, dtype), device, args.repeats, bandwidth)
                report["rows"].append({**key, **row})
                if "error" in row:
                    print(f"{name:22}{layout:10}{dtype:9}  {row['error'][:80]}")
                    continue
                share, temporary = row["copy_share"], row["temporary_bytes"] or 0
                print(
                    f"{name:22}{layout:10}{dtype:9}{row['device_ms']:8.3f}{row['host_ms']:8.3f}"
                    f"{row['whole_ms']:8.3f}{row['bytes_per_parameter']:8.2f}{100 * share:6.1f}%"
                    f"{temporary / 2**20:6.1f}{row['first_step_s']:7.2f}",
                    flush=True,
                )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
