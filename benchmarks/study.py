"""Runs a plan of the convergence study on every GPU, and goes on from its result file.

    CORPUS=FOLDER python benchmarks/study.py PLAN... --out FILE --workers 2 --limit 540

A plan is a list of runs: task, optimizer (or sketch), betas, rates, seeds. Each GPU has ``workers``
processes, which take the runs in order. A run starts only within ``limit`` seconds, so that what is
done is complete; the same command goes on later. A row is added to FILE, a line of JSON, when its
run ends.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import multiprocessing

RATES = (6.7e-4, 1e-3, 1.5e-3, 2.25e-3)
OCTAVES = "lv0:1:2:4:8:16:32:64/5"
FLUSH2 = "f | l2,q,n,1,B64"
FLUSH2_V3 = f"{OCTAVES} | l2,q,n,1,B64"


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    optimizer: str
    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    seed: int = 0
    steps: int | None = None


def tune(task: str = "bpe") -> Iterator[Run]:
    """AdamW over both betas and the rate, and the flush over the same."""
    for beta2, lr in product((0.99, 0.95, 0.999), RATES):
        for name in ("AdamW", FLUSH2):
            yield Run(task, name, lr, 0.9, beta2)
    for beta2, lr, beta1 in product((0.99, 0.95, 0.999), RATES[1:], (0.8, 0.95)):
        yield Run(task, "AdamW", lr, beta1, beta2)
    for beta1, lr in product((0.8, 0.95), RATES[1:3]):
        yield Run(task, FLUSH2, lr, beta1, 0.99)


WHY = (
    FLUSH2_V3,
    "f | f,h.5",
    "f | f,h.7",
    "f | f,h.9",
    "f | l2,q,n,1,B64,g",
    "f | f,k.12",
    "f | f,w1",
    "f | f,w3",
    "f | l2,q,n,0,B64",
    "f | l2,q,n,.5,B64",
    "f | l4,q,n,1,B64",
    "f | l1,q,n,1,B64",
    "f | l2,q,n,1,B64,e1",
    "f | l2,q,n,1,B64,o1",
    "f | r2,s1.25,p,1,B64",
)


def why(task: str = "bpe") -> Iterator[Run]:
    """What separates the effects of the flush, at two rates."""
    for spec, lr in product(WHY, RATES[1:3]):
        yield Run(task, spec, lr)


NESTEROV = {beta1: f"f | f,h{beta1:g}".replace("h0", "h") for beta1 in (0.9, 0.95, 0.98)}
TURBO = "TurboAdam 2 + 3, flush"


def look_ahead(task: str = "bpe") -> Iterator[Run]:
    """Nesterov's momentum against the flush, each with its own best beta1."""
    for beta1, lr in (
        (0.95, 1.5e-3),
        (0.95, 1e-3),
        (0.95, 2.25e-3),
        (0.98, 1.5e-3),
        (0.9, 2.25e-3),
    ):
        yield Run(task, NESTEROV[beta1], lr, beta1)
    for beta1, lr in ((0.95, 2.25e-3), (0.98, 1.5e-3)):
        yield Run(task, FLUSH2, lr, beta1)
    # how few bits
    yield Run(task, "lv0:1:2:4/-1.5 | l2,q,n,1,B64", 1.5e-3)
    yield Run(task, "lv0:1:2:4/-1.5 | l2,q,n,1,B64", 1.5e-3, 0.95)
    yield Run(task, f"{OCTAVES} | l1,q,n,1,B64", 1.5e-3, 0.95)
    yield Run(task, f"{OCTAVES} | l4,q,n,1,B64", 1.5e-3, 0.95)


def confirm(task: str = "bpe") -> Iterator[Run]:
    """Three seeds of the best settings, and the formats as they are built."""
    for seed in range(3):
        yield Run(task, "AdamW", 1.5e-3, 0.9, 0.999, seed)
        yield Run(task, "AdamW", 1.5e-3, 0.9, 0.99, seed)
        yield Run(task, TURBO, 1.5e-3, 0.9, 0.99, seed)
        yield Run(task, TURBO, 1.5e-3, 0.95, 0.99, seed)
        yield Run(task, NESTEROV[0.9], 1.5e-3, 0.9, 0.99, seed)
    yield Run(task, "TurboAdam", 1.5e-3, 0.9, 0.99)


def modern(task: str = "bpe-modern") -> Iterator[Run]:
    """Llama's block; ``--seeds`` repeats the best of each optimizer."""
    for lr in RATES[1:]:
        yield Run(task, "AdamW", lr, 0.9, 0.99)
        yield Run(task, "AdamW", lr, 0.9, 0.999)
        yield Run(task, TURBO, lr, 0.9, 0.99)
        yield Run(task, TURBO, lr, 0.95, 0.99)
    for lr in RATES[1:3]:
        yield Run(task, NESTEROV[0.95], lr, 0.95, 0.99)


def digits(task: str = "digits") -> Iterator[Run]:
    """The convolution; ``--seeds`` repeats the best of each optimizer."""
    for lr, beta2 in product((1e-3, 1.5e-3, 2.25e-3, 3.4e-3), (0.99, 0.999)):
        for name in ("AdamW", TURBO):
            yield Run(task, name, lr, 0.9, beta2)


def larger(task: str = "bpe-100m") -> Iterator[Run]:
    """92 million parameters, 600 steps."""
    for lr in (1e-3, 1.5e-3):
        yield Run(task, "AdamW", lr, 0.9, 0.99, steps=600)
        yield Run(task, TURBO, lr, 0.95, 0.99, steps=600)
    yield Run(task, TURBO, 1e-3, 0.9, 0.99, steps=600)
    yield Run(task, "AdamW", 6.7e-4, 0.9, 0.99, steps=600)
    yield Run(task, NESTEROV[0.95], 1e-3, 0.95, 0.99, steps=600)


def longer(task: str = "bpe") -> Iterator[Run]:
    """Four times the steps."""
    for name, beta1, beta2 in (
        ("AdamW", 0.9, 0.999),
        (TURBO, 0.95, 0.99),
        (NESTEROV[0.95], 0.95, 0.99),
        (TURBO, 0.9, 0.99),
    ):
        yield Run(task, name, 1e-3, beta1, beta2, steps=3200)


PLANS = {
    "tune": tune,
    "why": why,
    "look-ahead": look_ahead,
    "confirm": confirm,
    "modern": modern,
    "digits": digits,
    "larger": larger,
    "longer": longer,
}
# plans whose best settings are repeated with other seeds
REPEATED = ("modern", "digits")


def repeats(rows: list[dict[str, Any]], plan: str) -> Iterator[Run]:
    """The best setting of each optimizer of a plan, with seeds 1 and 2."""
    planned = list(PLANS[plan]())
    task, names = planned[0].task, dict.fromkeys(run.optimizer for run in planned)
    for name in names:
        found = [r for r in rows if (r["task"], r["optimizer"], r["seed"]) == (task, name, 0)]
        if found:
            top = min(found, key=lambda row: row["validation"])
            fields = {field: top[field] for field in asdict(planned[0])}
            for seed in (1, 2):
                yield Run(**{**fields, "seed": seed})


def work(device: int, jobs: Any, results: Any, deadline: float) -> None:
    """A process: takes runs until there are none, or no time."""
    import convergence
    from tasks import TASKS

    torch.cuda.set_device(device)
    made: dict[tuple[str, int | None], Any] = {}
    while True:
        job = jobs.get()
        if job is None or time.time() > deadline:
            break
        key = job.task, job.steps
        if key not in made:
            made[key] = TASKS[job.task](torch.device("cuda", device), job.steps).compiled()
        task = replace(made[key], options={**made[key].options, "betas": (job.beta1, job.beta2)})
        try:
            row = convergence.run(task, job.optimizer, job.lr, job.seed)
            results.put((job, {**asdict(job), **row, "unit": task.setup["unit"]}))
        except Exception as error:
            results.put((job, repr(error)))
    results.put(None)


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each optimizer's rows with the same options over the seeds: mean and spread, best first."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        options = [row[k] for k in ("task", "steps", "optimizer", "lr", "beta1", "beta2")]
        found.setdefault(tuple(options), []).append(row["validation"])
    table = [
        {
            **dict(zip(("task", "steps", "optimizer", "lr", "beta1", "beta2"), key, strict=True)),
            "seeds": len(values),
            "mean": mean(values),
            "spread": stdev(values) if len(values) > 1 else None,
        }
        for key, values in found.items()
    ]
    return sorted(table, key=lambda r: (r["task"], str(r["steps"]), r["mean"]))


def main() -> None:
    """Runs the plans; prints every row, and the best at the end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("plans", nargs="+", choices=PLANS)
    parser.add_argument("--out", type=Path, required=True, help="lines of JSON; continued")
    parser.add_argument("--workers", type=int, default=2, help="processes on each GPU")
    parser.add_argument("--limit", type=float, default=540, help="seconds in which runs start")
    args = parser.parse_args()
    deadline = time.time() + args.limit
    old = args.out.read_text().splitlines() if args.out.exists() else []
    rows = [json.loads(line) for line in old]
    done = {Run(**{field: row[field] for field in asdict(Run("", "", 0.0))}) for row in rows}
    todo = {plan: [run for run in PLANS[plan]() if run not in done] for plan in args.plans}
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    pending = dict.fromkeys(run for runs in todo.values() for run in runs)
    for job in pending:
        jobs.put(job)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    count = torch.cuda.device_count() * args.workers
    processes = [
        context.Process(target=work, args=(i % torch.cuda.device_count(), jobs, results, deadline))
        for i in range(count)
    ]
    for process in processes:
        process.start()
    begin = time.time()
    while count:
        for plan in [plan for plan in REPEATED if plan in todo and not pending.keys() & todo[plan]]:
            del todo[plan]
            for run in repeats(rows, plan):
                if run not in done:
                    pending[run] = None
                    jobs.put(run)
        if not pending:
            for _ in processes:
                jobs.put(None)
        answer = results.get()
        if answer is None:
            count -= 1
            continue
        job, row = answer
        pending.pop(job)
        head = f"{time.time() - begin:5.0f} s {job.task} {job.optimizer:34} lr {job.lr:g}"
        head += f" betas {job.beta1:g} {job.beta2:g} seed {job.seed}"
        if isinstance(row, str):
            print(head, row, flush=True)
            continue
        rows.append(row)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rms = f" rms {row['update_rms']:.3f}" if "update_rms" in row else ""
        print(f"{head}  {row['validation']:.4f}{rms}  {row['seconds']:.1f} s", flush=True)
    for process in processes:
        process.join()
    print()
    for row in best(rows):
        spread = "" if row["spread"] is None else f" +- {row['spread']:.4f}"
        print(
            f"{row['task']} {row['optimizer']:34} lr {row['lr']:g} betas {row['beta1']:g} "
            f"{row['beta2']:g}: {row['mean']:.4f}{spread} ({row['seeds']})"
        )


if __name__ == "__main__":
    main()
