"""Trains with sketches of AdamW's formats: which of them learn as AdamW does, before any is built.

    python benchmarks/sketches.py --task gpt --lr 1e-3 --beta2 .999 --seed 0 --out FILE

A sketch is AdamW on one flat vector. After each step its moments are rounded to what a format could
hold, and stay where they are, in fp32: no codes, no bytes and no scales are stored. So a format
costs a line of text to try, and its size is computed. What is rounded of the second moment is its
root r, and of the first u = m / r with the exact r; the next step takes m = u r with the rounded
ones. Small tensors are rounded too. Results are one seed a setting: hints, not a study.

A spec is "V | M":

    V   f              exact
        e2m2/L         levels of a minifloat with 2 bits of exponent and 2 of mantissa
        lv0:1:2:4/L    these levels, times the least power of two that reaches a block's largest
    M   f              exact
        LEVELS,SCALE,ROUND,FLUSH[,x][,zNULL]
        LEVELS  t7     0, +-1 ... +-7
                r4     +-.5, +-1.5, +-2.5, +-3.5
                l4     4 positive levels and their negatives, the best for a normal density
        SCALE   a      the block's largest is the highest level
                s.82   a step is .82 of the block's root mean square
                b2.8   the unit is that mean, or the largest / 2.8 if this is more
                q      the unit is that mean; when levels are chosen, by least squares
        ROUND   n      to nearest
                p      stochastic, in pairs of steps
        FLUSH   the share of beta1 / (1 - beta1) (m - stored m) that is added to the update
        x       u is of the exact root, as above; without it, r was exact
        zNULL   what is below NULL root mean squares counts as zero

A specification for `convergence.py` can have more options after the flush, which tell apart why a
flush helps, and an exact M may have the last three:

        BN      blocks of N elements; 128
        g       the residual with random signs: as large, but independent of m
        kF      F of m itself is the residual, in place of a rounding error
        eO, oO  only embeddings (e1), or all but embeddings (o1), are rounded
        hNU     quasi-hyperbolic: (1 - NU) g + NU m in place of m
        wC      noise of C block root mean squares, taken back at the next step

V is rounded stochastically: from a share f of the way between two levels, up with probability
f + f (1 - f) / L, which makes up for the mean of 1 / r. What is positive is at least the lowest
positive level.
"""

import argparse
import json
import math
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from convergence import RESULTS, rows_made_alike
from tasks import TASKS, Task
from torch import Tensor

from optstate.demo.train import schedule

BLOCK = 128
BASELINE = "AdamW"
FACTORS = 0x7FEB352D, 0x846CA68B
RESULT = RESULTS / "costate_sketches.json"
LLOYD_MAX = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    4: (0.2451, 0.7560, 1.344, 2.152),
    8: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}

OCTAVES = "lv0:1:2:4:8:16:32:64"
HALF_OCTAVES = "lv0:1:1.5:2:3:4:6:8"
WIDE_HALF_OCTAVES = HALF_OCTAVES + ":12:16:24:32:48:64:96:128"

# first moment + second moment: bits, levels, and what is not rounding in pairs without a flush
SKETCHES = {
    BASELINE: "f | f",
    "exact, beta1 0 + exact": "f | f",
    "3 normal, nearest, flush + exact": "f | l4,q,n,1",
    "2 normal, nearest, flush 1/4 + exact": "f | l2,q,n,.25",
    "1 sign, flush + exact": "f | l1,q,n,1",
    "1 sign, flush 1/2 + exact": "f | l1,q,n,.5",
    "4 even + 3 octaves": f"{OCTAVES}/5 | t7,a,p,0,x",
    "4 even + 3 octaves, lift 1/5.33": f"{OCTAVES}/5.33 | t7,a,p,0,x",
    "4 even + 3 half octaves": f"{HALF_OCTAVES}/12 | t7,a,p,0,x",
    "3 even + 4 half octaves": f"{WIDE_HALF_OCTAVES}/8 | t3,a,p,0,x",
    "3 halves .82 + 4 half octaves": f"{WIDE_HALF_OCTAVES}/12 | r4,s.82,p,0,x",
    "3 normal + 4 minifloat": "e2m2/32 | l4,a,p,0,x",
    "3 normal, cut + 4 minifloat": "e2m2/32 | l4,b2.8,p,0,x",
    "3 even + 3 octaves, lift 1/5.33": f"{OCTAVES}/5.33 | t3,a,p,0,x",
    "3 halves .75 + 3 octaves": f"{OCTAVES}/5 | r4,s.75,p,0,x",
    "3 halves .82 + 3 octaves": f"{OCTAVES}/5 | r4,s.82,p,0,x",
    "3 halves .82, null 1/10 + 3 octaves": f"{OCTAVES}/5 | r4,s.82,p,0,x,z.126",
    "3 halves .82, nearest, flush + 3 octaves": f"{OCTAVES}/5 | r4,s.82,n,1,x",
    "3 halves .75 + 3 half octaves": f"{HALF_OCTAVES}/12 | r4,s.75,p,0,x",
    "3 normal + 3 half octaves": f"{HALF_OCTAVES}/12 | l4,a,p,0,x",
    "3 normal, cut + 3 half octaves": f"{HALF_OCTAVES}/12 | l4,b2.8,p,0,x",
    "3 normal + 2 octaves": "lv0:1:2:4/-1.5 | l4,a,p,0,x",
    "2 halves 1.25 + 3 octaves": f"{OCTAVES}/5 | r2,s1.25,p,0,x",
    "2 halves 1.645 + 3 octaves": f"{OCTAVES}/5 | r2,s1.645,p,0,x",
    "2 halves 1.25 + 3 half octaves": f"{HALF_OCTAVES}/12 | r2,s1.25,p,0,x",
    "2 halves 1.25, flush 1/10 + 3 half octaves": f"{HALF_OCTAVES}/12 | r2,s1.25,p,.1,x",
    "2 halves 1.25 + 2 octaves": "lv0:1:2:4/-1.5 | r2,s1.25,p,0,x",
    "1 sign, flush + 3 octaves": f"{OCTAVES}/5 | l1,q,n,1,x",
    "1 sign, flush 1/2 + 3 half octaves": f"{HALF_OCTAVES}/12 | l1,q,n,.5,x",
    "1 sign, flush 1/4 + 3 half octaves": f"{HALF_OCTAVES}/12 | l1,q,n,.25,x",
}


def mix(x: int) -> int:
    """A hash of 32 bits."""
    x &= 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * FACTORS[0]) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * FACTORS[1]) & 0xFFFFFFFF
    return x ^ (x >> 16)


def keys(seed: int, step: int) -> Tensor:
    """The keys of a step's uniforms, int32: for the second moment, and for a pair's first."""
    second, first = mix(seed * 7919 + 1) + step, mix(seed * 7919 + 3) + step // 2
    return torch.tensor([mix(second), mix(first)]).to(torch.int32)


def uniform(index: Tensor, key: Tensor) -> Tensor:
    """Uniforms of 16 bits in (0, 1), from int32 indices and a key."""
    x = index + key
    x = (x ^ ((x >> 16) & 0xFFFF)) * FACTORS[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) + key
    x = x * (FACTORS[1] - (1 << 32))
    x = x ^ ((x >> 16) & 0xFFFF)
    return ((x >> 8) & 0xFFFF).to(torch.float32) * 2.0**-16 + 2.0**-17


def levels_v(text: str) -> tuple[float, ...]:
    """The levels of a second moment's root, without the lift."""
    if text == "e2m2":
        return tuple((1 + i % 4 / 4) * 2.0 ** (i // 4) - 1 for i in range(15))
    return tuple(float(level) for level in text.removeprefix("lv").split(":"))


def levels_m(text: str) -> tuple[float, ...]:
    """The levels of a first moment in update units."""
    kind, n = text[0], int(text[1:])
    if kind == "l":
        return tuple(-x for x in reversed(LLOYD_MAX[n])) + LLOYD_MAX[n]
    return tuple(i + (0.5 if kind == "r" else 0.0) for i in range(-n, n + (kind == "t")))


def bits(spec: str) -> float:
    """Bits a parameter: the least that tell the levels apart, and scales of 16 bits a block."""
    v, m = spec.split(" | ")
    moments = (v.partition("/")[0], levels_v), (m.partition(",")[0], levels_m)
    return sum(
        32 if text == "f" else math.ceil(math.log2(len(levels(text)))) + 16 / BLOCK
        for text, levels in moments
    )


def choose(x: Tensor, levels: tuple[float, ...], r: Tensor, lift: float = 0.0) -> Tensor:
    """One of the two levels around x: the upper one if its share and r reach 1."""
    low, high = torch.full_like(x, levels[0]), torch.full_like(x, levels[1])
    for a, b in pairwise(levels):
        low, high = torch.where(x >= a, a, low), torch.where(x >= a, b, high)
    share = ((x - low) / (high - low)).clamp(0, 1)
    share = share + lift * share * (1 - share)
    return torch.where(share + r >= 1, high, low)


def make_v(text: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Makes a function that rounds roots [blocks, BLOCK] with uniforms."""
    if text == "f":
        return lambda root, r: root
    head, _, lift = text.partition("/")
    levels = levels_v(head)
    top = int(torch.tensor(levels[-1]).view(torch.int32))
    exponent, mantissa = (top >> 23) - 127, top & 0x7FFFFF

    def quantise(root: Tensor, r: Tensor) -> Tensor:
        largest = root.amax(1, keepdim=True)
        # by its bits: the least power of two that, times the highest level, reaches the largest
        power = ((largest.view(torch.int32) + (0x7FFFFF - mantissa)) >> 23) - exponent
        scale = (power.clamp(27, 227) << 23).view(torch.float32)
        x = root / scale
        value = choose(x, levels, r, 1 / float(lift)).clamp(min=levels[1])
        return torch.where(x > 0, value * scale, 0.0)

    return quantise


def make_m(text: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Makes a function that rounds update units [blocks, BLOCK] with uniforms."""
    head, scale = text.split(",")[:2]
    levels = levels_m(head)

    def quantise(u: Tensor, r: Tensor) -> Tensor:
        largest = u.abs().amax(1, keepdim=True).clamp(min=1e-30)
        unit = u.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
        if scale == "a":
            unit = largest / levels[-1]
        elif scale[0] == "s":
            unit = unit * float(scale[1:])
        elif scale[0] == "b":
            unit = torch.maximum(unit, largest / float(scale[1:]))
        code = choose(u / unit, levels, r)
        if scale == "q":
            fit = (u * code).sum(1, keepdim=True)
            unit = fit / code.square().sum(1, keepdim=True).clamp(min=1e-30)
        return code * unit

    return quantise


def make_step(spec: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """(u, r, g, index, key, scalars) -> new u and r as they are kept, and the update over lr.

    All [blocks, BLOCK] but the keys and the scalars, which are beta1, beta2, the corrections of m
    and of r, eps and the step's number. u is m itself where the first moment is exact.
    """
    v, m_text = spec.split(" | ")
    exact = m_text == "f"
    round_v, round_m = make_v(v), None if exact else make_m(m_text)
    _, _, rounding, flush, *more = ["f", "", "", "0"] if exact else m_text.split(",")
    null = next((float(option[1:]) for option in more if option[0] == "z"), 0.0)

    def step(u, kept, g, index, key, scalars):
        b1, b2, correct_m, correct_r, eps, t = scalars
        m = b1 * (u if exact else u * kept) + (1 - b1) * g
        root = (b2 * kept * kept + (1 - b2) * g * g).sqrt()
        kept = round_v(root, uniform(index, key[0]))
        denominator = root * correct_r + eps
        if exact:
            return m, kept, m * correct_m / denominator
        u = m / root.clamp(min=2.0**-63)
        r = torch.full_like(u, 0.5)
        if rounding == "p":
            # the second step of a pair has what is left of the first one's to 1
            odd = torch.remainder(t, 2)
            r = uniform(index, key[1]) * (1 - 2 * odd) + odd
        if null:
            u = torch.where(u.abs() < null * u.square().mean(1, keepdim=True).sqrt(), 0.0, u)
        rounded = torch.where(kept > 0, round_m(u, r), 0.0)
        # no bias correction: the residual would enter later steps, which have less
        late = float(flush) * b1 / (1 - b1) * (u - rounded) * root
        return rounded, kept, (m * correct_m + late) / denominator

    return step


class Bench:
    """One model, for every run in turn; its parameters are views of a flat vector."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.device = task, device
        self.model = task.model(0)
        self.params = list(self.model.parameters())
        # every tensor begins at a block's border, as in the engine
        sizes = [-(-p.numel() // BLOCK) * BLOCK for p in self.params]
        self.flat, self.grad = torch.zeros(2, sum(sizes), device=device).unbind(0)
        pieces = zip(self.params, self.flat.split(sizes), self.grad.split(sizes), strict=True)
        for p, values, grads in pieces:
            p.data = values[: p.numel()].view(p.shape)
            p.grad = grads[: p.numel()].view(p.shape)
        self.index = torch.arange(sum(sizes), dtype=torch.int32, device=device).view(-1, BLOCK)

    def run(self, name: str, lr: float, beta2: float, seed: int) -> dict[str, Any]:
        """Train once; a row of the result."""
        task, spec = self.task, SKETCHES[name]
        for p, start in zip(self.params, task.model(seed).parameters(), strict=True):
            p.data.copy_(start.data)
        beta1 = 0.0 if "beta1 0" in name else task.options["betas"][0]
        share = schedule(task.steps)
        scalars, pairs = [], []
        for t in range(1, task.steps + 1):
            rate = lr * share(t - 1)
            corrections = [1 / (1 - beta1**t), (1 - beta2**t) ** -0.5]
            decay = 1 - rate * task.options["weight_decay"]
            scalars.append([beta1, beta2, *corrections, 1e-8, t, rate, decay])
            pairs.append(keys(seed, t))
        table, key = torch.tensor(scalars).to(self.device), torch.stack(pairs).to(self.device)
        p, g = self.flat.view(-1, BLOCK), self.grad.view(-1, BLOCK)
        u, kept = torch.zeros_like(p), torch.zeros_like(p)
        step, losses = make_step(spec), []
        begin = perf_counter()
        for done, batch in enumerate(task.batches(seed)):
            self.grad.zero_()
            loss = task.loss(self.model, batch)
            loss.backward()
            with torch.no_grad():
                clip = (1 / (self.grad.norm() + 1e-6)).clamp(max=1)
                *now, rate, decay = table[done].unbind(0)
                u, kept, change = step(u, kept, g * clip, self.index, key[done], now)
                p.copy_(p * decay - rate * change)
            losses.append(loss.detach())
        return {
            "name": name,
            "spec": spec,
            "bits": bits(spec),
            "lr": lr,
            "beta2": beta2,
            "seed": seed,
            "validation": finite(task.validate(self.model)),
            "train": finite(torch.stack(losses[-50:]).mean().item()),
            "seconds": perf_counter() - begin,
        }


def finite(x: float) -> float | None:
    """The number, or nothing where a run diverged."""
    return x if math.isfinite(x) else None


def compare(rows: list[dict[str, Any]]) -> None:
    """Give every row its difference from AdamW with the same rate, beta2 and seed."""
    setting = ("lr", "beta2", "seed")
    base = {tuple(r[k] for k in setting): r["validation"] for r in rows if r["name"] == BASELINE}
    for row in rows:
        pair = row["validation"], base.get(tuple(row[k] for k in setting))
        row["difference"] = None if None in pair else pair[0] - pair[1]


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown, largest first; AdamW itself is what they are compared with."""
    lines = [
        "| bits | first moment | second moment | lr | beta2 | difference from AdamW |",
        "|---|---|---|---|---|---|",
    ]
    order = list(SKETCHES)
    rows = [row for row in report["rows"] if row["name"] != BASELINE]
    for row in sorted(rows, key=lambda r: (-r["bits"], order.index(r["name"]), r["seed"])):
        first, second = row["name"].split(" + ")
        gap = "diverged" if row["difference"] is None else f"{row['difference']:+.4f}"
        cells = f"{first} | {second} | {row['lr']:g} | {row['beta2']:g} | {gap}"
        lines.append(f"| {row['bits']:g} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Runs every chosen sketch with every rate, beta2 and seed, and goes on from the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="gpt")
    parser.add_argument("--only", choices=SKETCHES, action="append", help="repeatable; all")
    parser.add_argument("--lr", type=float, action="append", help="repeatable; 1e-3")
    parser.add_argument("--beta2", type=float, action="append", help="repeatable; .999")
    parser.add_argument("--seed", type=int, action="append", help="repeatable; 0")
    parser.add_argument("--steps", type=int, help="the task's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="the loss as it is, for a CPU")
    parser.add_argument("--out", type=Path, required=True, help="begun, or gone on from")
    args = parser.parse_args()
    device = torch.device(args.device)
    task = TASKS[args.task](device, args.steps)
    if not args.no_compile:
        task = task.compiled()
    bench = Bench(task, device)
    setup = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **task.setup,
        "steps": task.steps,
        "beta1": task.options["betas"][0],
        "weight_decay": task.options["weight_decay"],
        "clip": 1.0,
    }
    rows = rows_made_alike(args.out, setup) if args.out.exists() else []
    every = product(args.lr or [1e-3], args.beta2 or [0.999], args.seed or [0])
    for (lr, beta2, seed), name in product(every, args.only or SKETCHES):
        rows.append(bench.run(name, lr, beta2, seed))
        compare(rows)
        args.out.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")
        print(f"{name:44} {rows[-1]['validation']}  {rows[-1]['seconds']:.1f} s", flush=True)
    print(table({"rows": rows}))


if __name__ == "__main__":
    main()
