"""Counts the state of GPT-2 (124 M parameters) under AdamW and the optimizers here, in bytes.

    python benchmarks/state_bytes.py

Nothing is allocated: the tensors are on torch's meta device. What ours take is what their formats
declare, which a law compares with real storages; what torch's takes is counted after a step. The
table is printed and everything written as JSON.
"""

import argparse
import json
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from layouts import LAYOUTS

from optstate_codecs import CodedOptimizer, predicted_state_bytes, state_bytes

RESULTS = Path(__file__).parent / "results" / "state_bytes.json"

# module, class, arguments
COUNTED: list[tuple[str, str, dict[str, Any]]] = [
    ("torch.optim", "AdamW", {}),
    ("lowbit_adam", "AdamW8bit", {}),
    ("lowbit_adam", "AdamWFp8", {}),
    ("lowbit_adam", "AdamW4bit", {}),
    ("turboadam", "TurboAdam", {"compress_m": False}),
    ("turboadam", "TurboAdam", {"compress_v": False}),
    ("turboadam", "TurboAdam", {"m_bits": 6, "v_bits": 8}),
    ("turboadam", "TurboAdam", {"mode": "adamw"}),
    ("turboadam", "TurboAdam", {"m_bits": 3}),
    ("turboadam", "TurboAdam", {"v_bits": 4}),
    ("turboadam", "TurboAdam", {}),
    ("turboadam", "TurboAdam", {"m_bits": 1}),
    ("turboadam", "TurboAdam", {"m_bits": 1, "v_bits": 2}),
]


def count(module: str, name: str, arguments: dict[str, Any], layout: str) -> dict[str, Any]:
    """One row: an optimizer's bytes of state once every parameter has been stepped."""
    shapes = LAYOUTS[layout]()
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = getattr(import_module(module), name)(params, **arguments)
    if isinstance(optimizer, CodedOptimizer):
        size = predicted_state_bytes(optimizer)
    else:
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
        size = state_bytes(optimizer)
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return {
        "optimizer": f"{name}({given})" if given else name,
        "state_bytes": size,
        "state_bits_per_parameter": 8 * size / sum(p.numel() for p in params),
    }


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown, for the terminal and the docs."""
    head = "| optimizer | MB of state | bits for each parameter | of AdamW's |"
    lines = [head, "|---|---|---|---|"]
    whole = report["rows"][0]["state_bytes"]
    lines += [
        f"| `{row['optimizer']}` | {row['state_bytes'] / 1e6:.1f} "
        f"| {row['state_bits_per_parameter']:.2f} | {row['state_bytes'] / whole:.1%} |"
        for row in report["rows"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Counts every optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="gpt2")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    shapes = LAYOUTS[args.layout]()
    report = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "layout": args.layout,
        "tensors": len(shapes),
        "parameters": sum(torch.Size(shape).numel() for shape in shapes),
        "rows": [count(*counted, args.layout) for counted in COUNTED],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
