"""Trains the same network with each optimizer from the same start on the same data, and compares.

    python benchmarks/convergence.py --task gpt --device cuda
    python benchmarks/convergence.py --task digits --only AdamW --only AdamW8bit

Every run of a seed has the same initial weights, data order and schedule (warm-up, then a cosine);
gradients are clipped at norm 1. The result is the paired difference of the held-out loss from
torch's AdamW, beside two yardsticks: exact AdamW in another implementation, which differs by
rounding alone, and Adam without momentum, which a task must be able to tell apart.
"""

import argparse
import json
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import torch
from tasks import TASKS, Task

from optstate.demo.train import schedule
from optstate_codecs.memory import state_bytes

RESULTS = Path(__file__).parent / "results"
BASELINE = "AdamW"

ADAMW = {"mode": "adamw"}
# module, class, further arguments, dtype of the parameters
CONTESTANTS: dict[str, tuple[str, str, dict[str, Any], torch.dtype]] = {
    BASELINE: ("torch.optim", "AdamW", {"fused": True}, torch.float32),
    "AdamW foreach": ("torch.optim", "AdamW", {"foreach": True}, torch.float32),
    "AdamW, beta1 0": ("torch.optim", "AdamW", {"betas": (0.0, 0.999)}, torch.float32),
    "AdamW bf16": ("torch.optim", "AdamW", {"fused": True}, torch.bfloat16),
    "stochbf16 AdamW": ("stochbf16", "AdamW", {}, torch.bfloat16),
    "stochbf16 AdamW + 24": (
        "stochbf16",
        "AdamW",
        {"master_weight_bits": 24},
        torch.bfloat16,
    ),
    "SGD": ("torch.optim", "SGD", {"momentum": 0.9}, torch.float32),
    "AdamW8bit": ("lowbit_adam", "AdamW8bit", {}, torch.float32),
    "AdamW8bit + 24": (
        "lowbit_adam",
        "AdamW8bit",
        {"master_weight_bits": 24},
        torch.bfloat16,
    ),
    "AdamWFp8": ("lowbit_adam", "AdamWFp8", {}, torch.float32),
    "AdamW4bit": ("lowbit_adam", "AdamW4bit", {}, torch.float32),
    # result files have the names that these had when mode "adamw" was the default
    "TurboAdam": ("turboadam", "TurboAdam", ADAMW, torch.float32),
    "TurboAdam 2 + 3": ("turboadam", "TurboAdam", {**ADAMW, "m_bits": 2}, torch.float32),
    "TurboAdam 2 + 2": (
        "turboadam",
        "TurboAdam",
        {**ADAMW, "m_bits": 2, "v_bits": 2},
        torch.float32,
    ),
    "TurboAdam 2 + 3, flush": ("turboadam", "TurboAdam", {}, torch.float32),
    "TurboAdam 1 + 3, flush": (
        "turboadam",
        "TurboAdam",
        {"m_bits": 1, "block_size": 128},
        torch.float32,
    ),
}


def contestant(name: str, seed: int) -> tuple[str, str, dict[str, Any], torch.dtype]:
    """What trains under a name: an optimizer, or a sketch, "V | M" as `sketches.py` says."""
    if " | " in name:
        options = {"spec": name, "seed": seed}
        return "sketch_optimizer", "SketchAdamW", options, torch.float32
    return CONTESTANTS[name]


def run(task: Task, name: str, lr: float, seed: int) -> dict[str, Any]:
    """Train once; the held-out loss at the end and along the way."""
    module, attribute, arguments, dtype = contestant(name, seed)
    make: Callable[..., torch.optim.Optimizer] = getattr(import_module(module), attribute)
    options = {**task.options, **arguments}
    if attribute == "SGD":
        # its rate is another: the best of those tried on each task is near a hundred Adam's
        options.pop("betas")
        options["weight_decay"] = 0.0
    model = task.model(seed).to(dtype)
    optimizer = make(model.parameters(), lr=lr * (100 if attribute == "SGD" else 1), **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(task.steps))
    losses, curve = [], []
    begin = perf_counter()
    for done, batch in enumerate(task.batches(seed), start=1):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
        if done % max(1, task.steps // task.evaluations) == 0:
            curve.append([done, task.validate(model)])
    numel = sum(p.numel() for p in model.parameters())
    length = getattr(optimizer, "length", None)
    return {
        "optimizer": name,
        "lr": lr,
        "seed": seed,
        "validation": task.validate(model),
        "curve": curve,
        "train": torch.stack(losses[-50:]).double().mean().item(),
        "state_bits_per_parameter": 8 * state_bytes(optimizer) / numel,
        **({} if length is None else {"update_rms": length.item() / task.steps}),
        "parameters": numel,
        "seconds": perf_counter() - begin,
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each optimizer and learning rate: mean, spread, and the paired difference."""
    base = {(r["lr"], r["seed"]): r["validation"] for r in rows if r["optimizer"] == BASELINE}
    found = []
    for name, lr in dict.fromkeys((r["optimizer"], r["lr"]) for r in rows):
        mine = [r for r in rows if (r["optimizer"], r["lr"]) == (name, lr)]
        values = [r["validation"] for r in mine]
        pairs = [(r, base.get((lr, r["seed"]))) for r in mine]
        gaps = [r["validation"] - b for r, b in pairs if b is not None]
        found.append(
            {
                "optimizer": name,
                "lr": lr,
                "seeds": len(mine),
                "mean": mean(values),
                "spread": stdev(values) if len(values) > 1 else None,
                "difference": mean(gaps) if gaps else None,
                "difference_spread": stdev(gaps) if len(gaps) > 1 else None,
                "state_bits_per_parameter": mine[0]["state_bits_per_parameter"],
            }
        )
    return found


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as Markdown, for the terminal and the docs."""
    lines = [
        "| optimizer | lr | bits of state | held-out loss | spread | difference from AdamW |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary:
        spread = "" if row["spread"] is None else f"{row['spread']:.4f}"
        gap = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        if row["difference_spread"] is not None:
            gap += f" +- {row['difference_spread']:.4f}"
        lines.append(
            f"| {row['optimizer']} | {row['lr']:g} | {row['state_bits_per_parameter']:.2f} "
            f"| {row['mean']:.4f} | {spread} | {gap} |"
        )
    return "\n".join(lines)


def rows_made_alike(earlier: Path, setup: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a result file, which has to have this setup: a table compares nothing else."""
    found = json.loads(earlier.read_text())
    mine = json.loads(json.dumps(setup))
    theirs = found["setup"]
    differ = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    if differ:
        what = ", ".join(f"{key} {theirs.get(key)}, here {mine.get(key)}" for key in differ)
        raise SystemExit(f"{earlier}: its setup differs: {what}")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def write(report: dict[str, Any], out: Path) -> None:
    """Keep what there is after every run."""
    order = list(CONTESTANTS)
    report["rows"].sort(key=lambda r: (r["lr"], order.index(r["optimizer"]), r["seed"]))
    report["summary"] = summarise(report["rows"])
    out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Runs every chosen optimizer with every seed and learning rate of a task."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="toy-gpt")
    parser.add_argument("--only", choices=CONTESTANTS, action="append", help="repeatable")
    parser.add_argument("--seed", type=int, action="append", help="repeatable; 0, 1 and 2")
    parser.add_argument("--lr", type=float, action="append", help="repeatable; the task's own")
    parser.add_argument("--beta2", type=float, help="the task's own")
    parser.add_argument("--steps", type=int, help="the task's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="results/convergence_TASK.json")
    parser.add_argument("--add", type=Path, action="append", help="a result file to go on from")
    parser.add_argument("--compile", action="store_true", help="the loss, by torch.compile")
    args = parser.parse_args()
    device = torch.device(args.device)
    task = TASKS[args.task](device, args.steps)
    if args.beta2 is not None:
        task.options["betas"] = (task.options["betas"][0], args.beta2)
    if args.compile:
        task = task.compiled()
    report: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "task": args.task,
        "setup": {**task.setup, **task.options, "steps": task.steps, "clip": 1.0},
        "rows": [],
    }
    out = args.out or RESULTS / f"convergence_{args.task.replace('-', '_')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for earlier in args.add or []:
        report["rows"] += rows_made_alike(earlier, report["setup"])
    done = {(row["lr"], row["seed"], row["optimizer"]) for row in report["rows"]}
    chosen = product(args.lr or task.lrs, args.seed or range(3), args.only or CONTESTANTS)
    for lr, seed, name in chosen:
        if (lr, seed, name) in done:
            continue
        row = run(task, name, lr, seed)
        report["rows"].append(row)
        write(report, out)
        print(
            f"{name:22} lr {lr:g} seed {seed}  {row['validation']:.4f}  {row['seconds']:.1f} s",
            flush=True,
        )
    write(report, out)
    print(f"\n{report['setup']['model']}, {task.steps} steps, {report['setup']['unit']}\n")
    print(table(report["summary"]))


if __name__ == "__main__":
    main()
