"""Compares the updates of 8-bit Adams with those of exact Adam, on the recursion.

State is read, updated and rewritten every step, so a format is judged by the update it gives after
many steps, not by one round trip. All arrangements and exact Adam (fp32 moments) see the same
gradients, drawn independently of the parameters. Three numbers come out, the first two over the
last steps, all elements together; u is exact Adam's update and u_q the coded one's:

    gain     <u_q, u> / <u, u>: 1 where steps are as long as they should be
    error    |u_q - u| / |u|: relative root mean square
    longest  the largest |u_q| of any element at any step, in units of the learning rate

    python benchmarks/fidelity_8bit.py --steps 3000 --out benchmarks/results/fidelity_8bit.json
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from platform import machine, python_version

import torch
from torch import Tensor
from torch.nn import Parameter

import optstate_codecs
from optstate_codecs import Adam, CodedOptimizer, Dynamic8, Format

RESULTS = Path(__file__).parent / "results" / "fidelity_8bit.json"
LR, BETA1, SEED, SPARSE = 1e-3, 0.9, 0, 0.05
BETA2 = (0.95, 0.999, 0.9999)
GRADIENTS = ("dense", "5 % sparse", "log-normal")
BLOCK = 2048


def arrangements() -> dict[str, tuple[Format | str, Format | str]]:
    """The formats of both moments, by what they are called in the table."""
    first, second = Dynamic8.first_moment(BLOCK), Dynamic8.second_moment(BLOCK)
    sr = "stochastic"
    return {
        "exact": ("fp32", "fp32"),
        "default": (first, second),
        "base 10": (
            Dynamic8(BLOCK, base=10, rounding=sr, units="update"),
            Dynamic8(BLOCK, signed=False, base=10, domain="sqrt", rounding=sr),
        ),
        "values to nearest": (Dynamic8(BLOCK, base=10), Dynamic8(BLOCK, signed=False, base=10)),
        "roots to nearest": (first, Dynamic8(BLOCK, signed=False, domain="sqrt")),
        "first in values": (Dynamic8(BLOCK, rounding=sr), second),
    }


def gradients(kind: str, steps: int, numel: int) -> Iterator[Tensor]:
    """Normal numbers: plain, a twentieth of them kept, or each element with a scale of its own."""
    generator = torch.Generator().manual_seed(SEED)
    spread = torch.exp(torch.randn(numel, generator=generator))
    for _ in range(steps):
        grad = torch.randn(numel, generator=generator)
        if kind == "5 % sparse":
            grad *= torch.rand(numel, generator=generator) < SPARSE
        elif kind == "log-normal":
            grad *= spread
        yield grad


class Follower:
    """One arrangement, and what has been seen of its updates."""

    def __init__(self, name: str, formats: tuple[Format | str, Format | str], beta2: float) -> None:
        self.name = name
        self.formats = [f if isinstance(f, str) else f.spec for f in formats]
        self.options = {"lr": LR, "betas": (BETA1, beta2)}
        self.param: Parameter | None = None
        self.along = self.squared = self.apart = self.longest = 0.0

    def update(self, grad: Tensor) -> Tensor:
        """The update that this gradient leads to, in units of the learning rate."""
        if self.param is None:
            self.param = Parameter(torch.zeros_like(grad))
            formats = dict(zip(("exp_avg", "exp_avg_sq"), self.formats, strict=True))
            self.optimizer = CodedOptimizer([self.param], Adam(), formats, **self.options)
        self.param.detach().zero_()
        self.param.grad = grad
        self.optimizer.step()
        update = self.param.detach() / LR
        self.longest = max(self.longest, float(update.abs().max()))
        return update

    def compare(self, update: Tensor, exact: Tensor) -> None:
        """Adds one step to the sums."""
        self.along += float((update * exact).sum())
        self.squared += float((exact * exact).sum())
        self.apart += float((update - exact).square().sum())

    def row(self, kind: str, beta2: float) -> dict[str, object]:
        """What came out, as it goes into the results."""
        return {
            "arrangement": self.name,
            "gradients": kind,
            "beta2": beta2,
            "gain": round(self.along / self.squared, 5),
            "error": round((self.apart / self.squared) ** 0.5, 5),
            "longest": round(self.longest, 3),
        }


def measure(kind: str, beta2: float, steps: int, last: int, numel: int) -> list[dict[str, object]]:
    """A row for each arrangement; the sums are over the ``last`` of the ``steps``."""
    followers = [Follower(name, formats, beta2) for name, formats in arrangements().items()]
    for step, grad in enumerate(gradients(kind, steps, numel)):
        updates = [follower.update(grad) for follower in followers]
        if step >= steps - last:
            for follower, update in zip(followers, updates, strict=True):
                follower.compare(update, updates[0])
    return [follower.row(kind, beta2) for follower in followers]


def table(rows: list[dict[str, object]], kind: str) -> str:
    """The results for one kind of gradients as the docs show them."""
    cells = {
        (row["arrangement"], row["beta2"]): (
            f"{row['gain']:.4f}, {100 * row['error']:.1f} %, {row['longest']:.2f}"
        )
        for row in rows
        if row["gradients"] == kind
    }
    lines = [["gradients " + kind, *(f"beta2 {beta2}" for beta2 in BETA2)], ["---"] * 4]
    lines += [[name, *(cells[name, beta2] for beta2 in BETA2)] for name in arrangements()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setup(steps: int, last: int, numel: int) -> dict[str, object]:
    """What has to be the same to get the same numbers."""
    return {
        "steps": steps,
        "last": last,
        "numel": numel,
        "block_size": BLOCK,
        "lr": LR,
        "beta1": BETA1,
        "eps": Adam().defaults()["eps"],
        "seed": SEED,
        "formats": {
            name: [f if isinstance(f, str) else f.spec for f in formats]
            for name, formats in arrangements().items()
        },
        "device": f"cpu {machine()}",
        "threads": torch.get_num_threads(),
        "python": python_version(),
        "torch": torch.__version__,
        "optstate_codecs": optstate_codecs.__version__,
    }


def main() -> None:
    """Measures every arrangement, prints the tables and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--last", type=int, default=50, help="steps that gain and error are over")
    parser.add_argument("--numel", type=int, default=16384, help="elements of the parameter")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write")
    args = parser.parse_args()
    size = args.steps, min(args.last, args.steps), args.numel
    rows = []
    print("In each cell: gain, error, longest step in lr.")
    for kind in GRADIENTS:
        for beta2 in BETA2:
            rows += measure(kind, beta2, *size)
        print(f"\n{table(rows, kind)}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setup": setup(*size), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
