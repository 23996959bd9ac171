"""Compares the updates of every format with those of exact Adam, on the recursion.

All arrangements and an Adam in float64 get the same gradients; ``optstate_codecs.testing.fidelity``
defines the measures. Prints the tables of the docs, and writes a JSON file, which `plots.py` draws.

    python benchmarks/fidelity.py --steps 3000 --out benchmarks/results/fidelity.json
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from platform import machine, python_version

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import optstate_codecs
from optstate_codecs import FP8, Adam, CodedOptimizer, Dynamic8, Format, Int4, Minifloat
from optstate_codecs.formats import CoState, OneQ
from optstate_codecs.testing import (
    GRADIENTS,
    Fidelity,
    Subject,
    compare,
    scale_equivariance,
    stops,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fidelity.json"
BETA2 = (0.95, 0.99, 0.999, 0.9999)
QUOTED = 0.999
# of the matrices in which elements' scales are those of their rows and columns
MATRIX_ROWS = 32
BARS = ("dense", "5 % sparse")
# kinds of gradients that are sparse by rows, as those of a large vocabulary's embedding
SPARSE_ROWS = ("Zipf rows", "waking rows")
KINDS = tuple(kind for kind in GRADIENTS if kind not in SPARSE_ROWS)
SR = "stochastic"
# arrangements with error feedback
FED_BACK = ("turbo 5.25, flush", "turbo 4.25, sign", "turbo 5.5, nearest, flush")
# rows of the short table
SUMMARY = ("8-bit", "FP8", "4-bit", "turbo 7.25", "8-bit, roots to nearest", "4-bit, as published")

Formats = tuple[Format | str, Format | str]


def arrangements() -> dict[str, Formats]:
    """The formats of both moments, by what they are called in the tables."""
    first8, second8 = Dynamic8.first_moment(), Dynamic8.second_moment()
    fp8, root8 = FP8.first_moment(), Minifloat.second_moment8()
    first4, second4 = Int4.first_moment(), Minifloat.second_moment4()
    e1m2 = partial(Minifloat, 1, 2, signed=True, units="update")
    root4 = partial(Minifloat, domain="sqrt", rounding=SR, lift=1 / 32)
    return {
        "bf16": ("bf16", "bf16"),
        "8-bit": (first8, second8),
        "8-bit, base 10": (
            Dynamic8(base=10, rounding=SR, units="update"),
            Dynamic8(signed=False, base=10, domain="sqrt", rounding=SR),
        ),
        "8-bit, values to nearest": (Dynamic8(base=10), Dynamic8(signed=False, base=10)),
        "8-bit, roots to nearest": (first8, Dynamic8(signed=False, domain="sqrt")),
        "8-bit, first in values": (Dynamic8(rounding=SR), second8),
        "FP8": (fp8, second8),
        "FP8, e4m4 roots": (fp8, root8),
        "FP8, e3m5 roots": (fp8, Minifloat(3, 5, 2048, domain="sqrt", rounding=SR)),
        "FP8, unpaired": (FP8(rounding=SR, units="update"), second8),
        "FP8, e4m3 values to nearest": (FP8(), FP8(signed=False)),
        "4-bit": (first4, second4),
        "4-bit, blocks of 64": (Int4.first_moment(64), Minifloat.second_moment4(64)),
        "4-bit, unpaired": (Int4(rounding=SR, units="update"), second4),
        "4-bit, e1m2 first": (e1m2(rounding="paired"), second4),
        "4-bit, not lifted": (first4, root4(2, 2, lift=0.0)),
        "4-bit, e1m3 roots": (first4, root4(1, 3)),
        "4-bit, e3m1 roots": (first4, root4(3, 1)),
        "4-bit, as published": ("dynamic4", "linear4"),
        "turbo 7.25": (CoState(4), OneQ(3)),
        "turbo 7.25, 3 + 4": (CoState(3), OneQ(4)),
        "turbo 6.25": (CoState(3), OneQ(3)),
        "turbo 5.25": (CoState(2), OneQ(3)),
        "turbo 5.25, flush": (CoState(2), OneQ(3)),
        "turbo 4.25": (CoState(2), OneQ(2)),
        "turbo 4.25, sign": (CoState(1), OneQ(3)),
    }


def in_matrices() -> dict[str, Formats]:
    """The arrangements that are compared where scales differ by row and column."""
    first4, rank1 = Int4.first_moment(), "linear4(normalization=rank1)"
    shared = {name: arrangements()[name] for name in ("4-bit", "4-bit, as published")}
    return {
        **shared,
        "4-bit, as published, rank-1": ("dynamic4", rank1),
        "4-bit, linear second": (first4, "linear4"),
        "4-bit, linear second, rank-1": (first4, rank1),
    }


def in_rows() -> dict[str, Formats]:
    """The arrangements that are compared where gradients are sparse by rows."""
    names = ("8-bit", "4-bit", "turbo 7.25", "turbo 6.25", "turbo 5.25", "turbo 5.25, flush")
    shared = {name: arrangements()[name] for name in names}
    nearest = CoState(2, 64, levels="normal"), OneQ(3, 64)
    return {**shared, "turbo 5.5, nearest, flush": nearest}


#: the arrangements of each part of the file
PARTS = {"rows": arrangements, "sparse rows": in_rows, "matrices": in_matrices}


def makers(arranged: dict[str, Formats]) -> dict[str, Callable[..., CodedOptimizer]]:
    """Adam with the formats of each arrangement."""
    names = "exp_avg", "exp_avg_sq"
    return {
        name: partial(
            CodedOptimizer,
            rule=Adam(error_feedback=name in FED_BACK),
            formats=dict(zip(names, formats, strict=True)),
        )
        for name, formats in arranged.items()
    }


def same_codes(name: str, make: Callable[..., CodedOptimizer]) -> bool:
    """Whether gradients times a power of two give the same codes."""
    try:
        scale_equivariance(Subject(name, make))
    except AssertionError:
        return False
    return True


def measure(steps: int, last: int, numel: int) -> dict[str, list[dict[str, object]]]:
    """A row for each arrangement, kind of gradients and beta2; and one for each arrangement."""
    makes, by_row = makers(arrangements()), makers(in_matrices())
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    rows, probes = [], []
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("steps of all", total=(len(BETA2) + 2) * steps)
        same = {"steps": steps, "last": last, "numel": numel}
        same["advance"] = partial(progress.advance, bar)
        for beta2 in BETA2:
            rows += listed(compare(makes, beta2, KINDS, **same), beta2)
        sparse = listed(compare(makers(in_rows()), QUOTED, SPARSE_ROWS, **same), QUOTED)
        matrices = listed(compare(by_row, QUOTED, KINDS, rows=MATRIX_ROWS, **same), QUOTED)
        for name, make in progress.track(makes.items(), description="stopped gradients"):
            probe = {key: round(v, 5) for key, v in asdict(stops(make, steps=steps // 3)).items()}
            probes.append({"arrangement": name, **probe, "same_codes": same_codes(name, make)})
    return {"rows": rows, "sparse rows": sparse, "matrices": matrices, "probes": probes}


def listed(found: dict[str, dict[str, Fidelity]], beta2: float) -> list[dict[str, object]]:
    """The results as rows of the file."""
    return [
        {"arrangement": name, "gradients": kind, "beta2": beta2}
        | {key: round(value, 5) for key, value in asdict(fidelity).items()}
        for name, kinds in found.items()
        for kind, fidelity in kinds.items()
    ]


def by_kind(result: dict[str, list], key: str = "rows") -> list[list[str]]:
    """Gain and error at one beta2, a column for each kind of gradients."""
    rows, names = result[key], PARTS[key]()
    where = "" if key == "rows" else f"{key}, "
    kinds = SPARSE_ROWS if key == "sparse rows" else KINDS
    lines = [[f"{where}beta2 {QUOTED}: gain, error", *kinds]]
    for name in names:
        cells = {
            row["gradients"]: f"{row['gain']:.3f}, {100 * row['error']:.0f} %"
            for row in rows
            if (row["arrangement"], row["beta2"]) == (name, QUOTED)
        }
        lines.append([name, *(cells[kind] for kind in kinds)])
    return lines


def overall(result: dict[str, list]) -> list[list[str]]:
    """The bits of each arrangement, and its worst results over all measurements."""
    heads = ["bits", *(f"gain, {bar}" for bar in BARS), "longest", "spread", "path"]
    lines = [["all beta2", *heads, "drift", "same codes"]]
    for (name, formats), probe in zip(arrangements().items(), result["probes"], strict=True):
        rows = [row for row in result["rows"] if row["arrangement"] == name]
        bits = sum(8 * optstate_codecs.formats.as_format(f).nbytes(2**20) / 2**20 for f in formats)
        dense = next(r for r in rows if (r["gradients"], r["beta2"]) == ("dense", QUOTED))
        cells = [f"{bits:.2f}"]
        for bar in BARS:
            gains = [row["gain"] for row in rows if row["gradients"] == bar]
            cells.append(f"{min(gains):.3f} to {max(gains):.3f}")
        cells.append(f"{max(row['longest'] for row in rows):.1f} lr")
        cells += [f"{dense['log_spread']:.3f}", f"{100 * dense['path']:.0f} %"]
        cells += [f"{probe['drift']:.1f} lr", "yes" if probe["same_codes"] else "no"]
        lines.append([name, *cells])
    return lines


def summary(result: dict[str, list]) -> list[list[str]]:
    """The most telling columns of ``overall`` for the defaults and two that round to nearest."""
    head, *lines = overall(result)
    columns = [head.index(name) for name in head if name not in ("spread", "same codes")]
    chosen = [line for name in SUMMARY for line in lines if line[0] == name]
    return [[line[column] for column in columns] for line in (head, *chosen)]


def markdown(lines: list[list[str]]) -> str:
    """A table as the docs show it."""
    head, *body = lines
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def show(lines: list[list[str]]) -> None:
    """A table in the terminal."""
    table = Table(*lines[0])
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=160).print(table)


def texts(arranged: dict[str, Formats]) -> dict[str, list[str]]:
    """The formats of each arrangement as text."""
    return {
        name: [f if isinstance(f, str) else f.spec for f in formats]
        for name, formats in arranged.items()
    }


def setup(steps: int, last: int, numel: int) -> dict[str, object]:
    """The settings and versions that determine the numbers."""
    return {
        "steps": steps,
        "last": last,
        "numel": numel,
        "beta1": 0.9,
        "eps": 1e-8,
        "seed": 0,
        "formats": texts(arrangements()),
        "error_feedback": list(FED_BACK),
        "sparse rows": {"formats": texts(in_rows())},
        "matrices": {"rows": MATRIX_ROWS, "formats": texts(in_matrices())},
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
    parser.add_argument("--last", type=int, default=100, help="steps that gain and error are over")
    parser.add_argument("--numel", type=int, default=2048, help="elements of a kind of gradients")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write")
    parser.add_argument("--markdown", action="store_true", help="print the tables as the docs do")
    args = parser.parse_args()
    size = args.steps, min(args.last, args.steps), args.numel
    result = measure(*size)
    tables = (
        *(by_kind(result, part) for part in PARTS),
        overall(result),
        summary(result),
    )
    for lines in tables:
        print(f"\n{markdown(lines)}") if args.markdown else show(lines)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setup": setup(*size), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
