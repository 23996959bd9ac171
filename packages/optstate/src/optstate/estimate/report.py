"""The tables of an estimate."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from optstate.console import gigabytes, table

BYTES = (
    ("params", "parameter_bytes"),
    ("grads", "gradient_bytes"),
    ("state", "state_bytes"),
    ("master", "master_bytes"),
    ("total", "total_bytes"),
)
Row = dict[str, Any]


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of one optimizer and store: with gradients kept, and released."""
    found = []
    for _, together in groupby(rows, key=lambda row: (row["optimizer"], row["store"])):
        kept, released = together
        found.append((kept, released))
    return found


def name_in_first_row(row: Row, rows: Sequence[Row]) -> str:
    """The optimizer's name in the first of its rows, else nothing."""
    first = next(one for one in rows if one["optimizer"] == row["optimizer"])
    return str(row["optimizer"]) if row is first else ""


def bytes_table(title: str, rows: Sequence[Row]) -> Table:
    """GB of everything that a step needs, a row for each optimizer and store."""
    both = pairs(rows)
    shown = [one for one in BYTES if any(kept[one[1]] for kept, _ in both)]
    heads = [name for name, _ in shown]
    made = table(title, ("optimizer", "state on", *heads, "released", "RAM", "file"), left=2)
    for kept, released in both:
        made.add_row(
            name_in_first_row(kept, rows),
            kept["store"],
            *(gigabytes(kept[key]) for _, key in shown),
            gigabytes(released["total_bytes"]),
            gigabytes(kept["host_bytes"]),
            gigabytes(kept["file_bytes"]),
        )
    return made


def cards_table(rows: Sequence[Row], cards: Sequence[float]) -> Table:
    """Which cards each optimizer and store fits: with gradients kept, only released, or not."""
    made = table(
        "\nFits on a card of this many GB: yes, or rel. with released gradients",
        ("optimizer", "state on", *(f"{card:g}" for card in cards)),
        left=2,
    )
    for kept, released in pairs(rows):
        verdicts = [
            "yes" if card in kept["fits_gb"] else "rel." if card in released["fits_gb"] else ""
            for card in cards
        ]
        made.add_row(name_in_first_row(kept, rows), kept["store"], *verdicts)
    return made
