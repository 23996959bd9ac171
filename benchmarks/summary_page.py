"""Writes the short tables of the benchmarks' summary from the committed results.

    python benchmarks/summary_page.py

The plots beside them come from `plots.py`, which names the rows of both.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from offload_page import Columns, Report, grid
from plots import LEARNT, OFFLOADED, RATES, STEPS, load, offloaded_steps, timings

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
WRAPPED = ("exact wrap", "int8 momentum", "low memory", "max compression")


def table(heads: Iterable[str], rows: list[list[str]]) -> str:
    """A table of rows that are in the order of their heads."""
    columns: Columns = {
        head: lambda row, number=number: row[str(number)] for number, head in enumerate(heads)
    }
    return grid(columns, [{str(n): cell for n, cell in enumerate(row)} for row in rows])


def steps(card: str) -> str:
    """Time, bandwidth and state of a step on a GPU."""
    found, rows = timings(card), []
    for key, name, _ in STEPS:
        if row := found.get(key):
            share = f"{100 * row['share']:.0f} %" if "share" in row else "not counted"
            bits = f"{row['bits']:.1f}" if "bits" in row else "not counted"
            rows.append([name, f"{row['ms']:.1f}", f"{row['whole_ms']:.1f}", share, bits])
    return table(("bf16 parameters", "GPU ms", "with host, ms", "of copy speed", "bits"), rows)


def learnt() -> str:
    """Held-out loss less AdamW's at both rates."""

    def difference(found: dict[float, Report], lr: float) -> str:
        row = found.get(lr)
        return f"{row['difference']:+.4f} +- {row['difference_spread']:.4f}" if row else ""

    rows = []
    for file, key, name, _ in LEARNT:
        found = {row["lr"]: row for row in load(file)["summary"] if row["optimizer"] == key}
        bits = f"{next(iter(found.values()))['state_bits_per_parameter']:.1f}"
        rows.append([name, bits, *(difference(found, lr) for lr in RATES)])
    return table(("", "bits", *(f"lr {lr:g}" for lr in RATES)), rows)


def offloaded() -> str:
    """Training steps with state in host memory, by the number of tokens."""
    short, long = (offloaded_steps(tokens) for tokens in (4096, 8192))

    def ms(found: dict[str, Report], key: str) -> str:
        return f"{found[key]['ms']:.0f}" if key in found else ""

    rows = []
    for key, name, _ in OFFLOADED:
        size = short[key]["host_bytes_per_parameter"]
        kinds = (short, key), (short, f"{key}, released"), (long, f"{key}, released")
        rows.append([name, f"{size:.2f}", *(ms(*kind) for kind in kinds)])
    heads = ("", "host bytes/param", "4,096 tokens", "4,096, released", "8,192, released")
    return table(heads, rows)


def wrapped() -> str:
    """Times of wrapped AdamW, as multiples of the plain one's."""
    files = [load(f"wrap_overhead_{where}.json") for where in ("cpu", "cuda")]
    found = [{row["optimizer"]: row for row in file["rows"]} for file in files]
    rows = [
        [
            name,
            f"{cpu[name]['state_bits_per_parameter']:.1f}",
            *(f"{f[name]['times']:.2f}" for f in found),
        ]
        for cpu in found[:1]
        for name in WRAPPED
    ]
    card = files[1]["setup"]["device"]
    return table(("", "bits", "times AdamW, 2 CPU cores", f"times AdamW, {card}"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "steps": partial(steps, "h200"),
    "steps on an H100": partial(steps, "h100"),
    "learnt": learnt,
    "offloaded": offloaded,
    "wrapped": wrapped,
}


def written(text: str) -> str:
    """The page with every table between its markers."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}, by benchmarks/summary_page.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n\n{make()}\n\n{end}{after}"
    return text


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", type=Path, default=PAGE)
    page = parser.parse_args().page
    page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main()
