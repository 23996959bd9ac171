"""Runs a plan of the convergence study on every GPU, and goes on from its result file.

    CORPUS=FOLDER python benchmarks/study.py PLAN... --workers 2 --limit 540

A plan is a list of runs: task, optimizer (or sketch), betas, rates, seeds. Each GPU has ``workers``
processes, which take the runs in order; without a GPU they are on the CPU. A run starts only within
``limit`` seconds, so that what is done is complete; the same command goes on later. The result file
is written anew when a run ends. `study_page.py` makes the tables of the docs from it.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

RESULT = Path(__file__).parent / "results" / "error_feedback.json"
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
    """Llama's block; the runner repeats the best of each optimizer with other seeds."""
    for lr in RATES[1:]:
        yield Run(task, "AdamW", lr, 0.9, 0.99)
        yield Run(task, "AdamW", lr, 0.9, 0.999)
        yield Run(task, TURBO, lr, 0.9, 0.99)
        yield Run(task, TURBO, lr, 0.95, 0.99)
    for lr in RATES[1:3]:
        yield Run(task, NESTEROV[0.95], lr, 0.95, 0.99)


def seeds(task: str = "bpe-modern") -> Iterator[Run]:
    """Three seeds of the best settings with Llama's block."""
    for seed in (1, 2):
        yield Run(task, "AdamW", 1e-3, 0.9, 0.999, seed)
        yield Run(task, "AdamW", 1.5e-3, 0.9, 0.99, seed)
        yield Run(task, TURBO, 1.5e-3, 0.9, 0.99, seed)
        yield Run(task, TURBO, 1.5e-3, 0.95, 0.99, seed)
    yield Run(task, NESTEROV[0.9], 1.5e-3, 0.9, 0.99)


def digits(task: str = "digits") -> Iterator[Run]:
    """The convolution: six seeds near the best rates, since losses are small and vary."""
    for lr, beta2 in product((1e-3, 1.5e-3, 2.25e-3, 3.4e-3, 5.1e-3, 7.7e-3), (0.99, 0.999)):
        for seed, name in product(range(6 if lr > 3e-3 else 1), ("AdamW", TURBO)):
            yield Run(task, name, lr, 0.9, beta2, seed)


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
    "seeds": seeds,
    "digits": digits,
    "larger": larger,
    "longer": longer,
}
# plans whose best settings are repeated with other seeds
REPEATED = ("modern",)


def name_of(device: torch.device) -> str:
    """The name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def read(file: Path) -> dict[str, Any]:
    """A result file, or an empty report."""
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    return {"setup": {}, "rows": []}


def add(report: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a row; what is the same for its task goes to the setup."""
    own = {*asdict(Run("", "", 0.0)), "validation", "train", "curve", "update_rms", "seconds"}
    own |= {"state_bits_per_parameter", "device"}
    report["rows"].append({key: value for key, value in row.items() if key in own})
    shared = {key: value for key, value in row.items() if key not in own}
    report["setup"][row["task"]] = {**shared, "clip": 1.0, "weight decay": 0.1}
    report["setup"]["torch"] = torch.__version__


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

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(device)
    where = torch.device("cuda", device) if on_gpu else torch.device("cpu")
    torch.set_num_threads(4 if on_gpu else 1)
    made: dict[tuple[str, int | None], Any] = {}
    while True:
        job = jobs.get()
        if job is None or time.time() > deadline:
            break
        key = job.task, job.steps
        if key not in made:
            made[key] = TASKS[job.task](where, job.steps)
            if on_gpu:
                made[key] = made[key].compiled()
        task = replace(made[key], options={**made[key].options, "betas": (job.beta1, job.beta2)})
        try:
            row = convergence.run(task, job.optimizer, job.lr, job.seed)
            results.put((job, {**asdict(job), **row, "device": name_of(where), **task.setup}))
        except Exception as error:
            results.put((job, repr(error)))
    results.put(None)


def main() -> None:
    """Runs the plans and prints every row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("plans", nargs="+", choices=PLANS)
    parser.add_argument("--out", type=Path, default=RESULT, help="begun, or continued")
    parser.add_argument("--workers", type=int, default=2, help="processes on each GPU")
    parser.add_argument("--limit", type=float, default=540, help="seconds in which runs start")
    args = parser.parse_args()
    deadline = time.time() + args.limit
    report = read(args.out)
    rows = report["rows"]
    done = {Run(**{field: row[field] for field in asdict(Run("", "", 0.0))}) for row in rows}
    todo = {plan: [run for run in PLANS[plan]() if run not in done] for plan in args.plans}
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    pending = dict.fromkeys(run for runs in todo.values() for run in runs)
    for job in pending:
        jobs.put(job)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    devices = max(1, torch.cuda.device_count())
    count = devices * args.workers
    processes = [
        context.Process(target=work, args=(i % devices, jobs, results, deadline))
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
        add(report, row)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        rms = f" rms {row['update_rms']:.3f}" if "update_rms" in row else ""
        print(f"{head}  {row['validation']:.4f}{rms}  {row['seconds']:.1f} s", flush=True)
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
