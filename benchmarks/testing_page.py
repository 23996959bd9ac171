"""Writes the counts of the tests into the page on testing, from the committed results.

    python benchmarks/testing_page.py

A test compares the page with the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offload_page import grid

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "concepts" / "testing.md"
RESULTS = ROOT / "benchmarks" / "results"
Run = dict[str, Any]


def runs(name: str) -> dict[str, Run]:
    """The runs of a result, by name."""
    found: dict[str, Run] = json.loads((RESULTS / f"{name}.json").read_text())["runs"]
    return found


def of_setup(run: Run) -> str:
    """Versions and machine."""
    setup = run["setup"]
    versions = f"Python {setup['python']}, torch {setup['torch']}"
    return f"{versions}, {setup['system']}, {setup['cores']} cores"


def outcomes(run: Run) -> str:
    """How many tests had which outcome."""
    found = ", ".join(f"{count:,} {name}" for name, count in run["outcomes"].items())
    return f"{found}; ended early" if run.get("ended early") else found


def laws() -> str:
    """The cases of the law suite that apply, and those of the committed runs."""
    columns = {
        "run": lambda row: row["name"],
        "cases": lambda row: f"{row['cases']:,}",
        "outcomes": outcomes,
        "seconds": lambda row: f"{row['seconds']:,}",
        "setup": of_setup,
    }
    rows = [{"name": name, **run} for name, run in runs("suite").items()]
    apply = max((row["that apply"] for row in rows), key=lambda found: int(found["cases"]))
    share = apply["on a CPU"] / apply["cases"]
    return (
        f"{apply['cases']:,} cases apply, {share:.0%} of them on a CPU. The committed runs:\n\n"
        + grid(columns, rows)
    )


def soak() -> str:
    """What was injected, killed and stepped."""
    columns = {
        "run": lambda row: row["name"],
        "counted": lambda row: ", ".join(f"{n:,} {what}" for what, n in row["counts"].items()),
        "tests": outcomes,
        "seconds": lambda row: f"{row['seconds']:,}",
    }
    rows = [{"name": name, **run} for name, run in runs("soak").items()]
    setups = "; ".join(sorted({of_setup(row) for row in rows}))
    return f"{grid(columns, rows)}\n\nSetup: {setups}, shared with other work."


def matrix() -> str:
    """Versions, and what was run with them."""
    columns = {
        "Python": lambda row: row["setup"]["python"],
        "torch": lambda row: row["setup"]["torch"],
        "distribution": lambda row: row["name"].rpartition(", ")[2],
        "tests": outcomes,
        "seconds": lambda row: f"{row['seconds']:,}",
    }
    return grid(columns, [{"name": name, **run} for name, run in runs("matrix").items()])


def fuzz() -> str:
    """The sum of the fuzzing runs; the page on threats has each."""
    rows = json.loads((RESULTS / "fuzz.json").read_text())["rows"]
    return (
        f"{sum(row['executions'] for row in rows):,} executions in "
        f"{sum(row['seconds'] for row in rows):,} seconds, "
        f"{sum(len(row['findings']) for row in rows)} open findings."
    )


TABLES = {"laws": laws, "soak": soak, "fuzz": fuzz, "matrix": matrix}


def block(name: str) -> str:
    """A table between its marks."""
    return f"<!-- {name}, by benchmarks/testing_page.py -->\n\n{TABLES[name]()}\n\n<!-- end -->"


def main() -> None:
    """Replace the tables on the page."""
    text = PAGE.read_text()
    for name in TABLES:
        head, mark, rest = text.partition(f"<!-- {name}, by benchmarks/testing_page.py -->")
        if not mark:
            raise SystemExit(f"{PAGE}: has no mark for the table {name!r}")
        text = head + block(name) + rest.partition("<!-- end -->")[2]
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
