"""Runs ``optstate estimate``."""

import re
from collections.abc import Sequence

from optstate.console import blame, note, output, print_json, reported, require_all
from optstate.estimate.cards import CARDS

ABOUT = (
    "GB are 10^9 bytes, at the peak of a step: parameters, gradients, and state where it is on the"
    " device; else three chunks of it. released: gradients are stepped and freed during the"
    " backward pass (GradientRelease)."
)
NO_ACTIVATIONS = "Activations are not counted: add them with --activations 4GB."
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def byte_count(text: str) -> int:
    """The bytes that a text such as ``4GB``, ``512MiB`` or ``1e9`` stands for.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?|[kmgt]i)b?", text.lower())
    if found is None:
        raise ValueError(f"{text!r}: must be bytes, such as 4GB, 512MiB or 0")
    number, unit = found.groups()
    return round(float(number) * {**UNITS, **BINARY}[unit])


def card_size(text: str) -> float:
    """The GB that a text such as ``24`` or ``24GB`` stands for.

    Raises:
        ValueError: it is none.
    """
    number = text.lower().removesuffix("gb").strip()
    if not re.fullmatch(r"\d+(\.\d+)?", number) or float(number) == 0:
        raise ValueError(f"{text!r}: must be GB of memory, such as 24 or 24GB")
    return float(number)


def run(
    source: str,
    *,
    optimizers: Sequence[str],
    stores: Sequence[str],
    dtype: str | None,
    master_weights: int | None,
    activations: str,
    cards: Sequence[str],
    key: str | None,
    layers: int | None,
    as_json: bool,
) -> None:
    """Counts and reports; the arguments are those of the command.

    Raises:
        typer.BadParameter: An argument's value is not allowed.
        typer.Exit: With code 1 if something is not installed.
    """
    with blame("--activations"):
        added = byte_count(activations)
    with blame("--card"):
        sizes = sorted(map(card_size, cards)) or list(CARDS)
    require_all("codecs", "torch", "optstate_codecs")
    from optstate.estimate.count import STORES
    from optstate.estimate.optimizers import candidates, rows
    from optstate.estimate.report import bytes_table, cards_table
    from optstate.models.model import DTYPES
    from optstate.models.sources import read_model

    with blame("MODEL"):
        model = read_model(source, None if dtype is None else DTYPES[dtype], key, layers)
    with blame("--optimizer"), reported():
        chosen, missing = candidates(optimizers, master_weights)
        wanted = [store for store in STORES if store in stores or not stores]
        found = list(rows(model, chosen, wanted, added, sizes))
    notes = [*model.notes, *missing]
    if as_json:
        print_json(
            {
                "model": model.source,
                "parameters": model.parameters,
                "trained_parameters": model.trained_parameters,
                "tensors": len(model.entries),
                "dtype": model.dtypes,
                "cards_gb": sizes,
                "rows": found,
                "notes": notes,
            }
        )
        return
    title = f"{model.source}: {model.parameters:,} parameters in {model.dtypes}"
    console = output(width=120)
    console.print(bytes_table(title, found))
    console.print(cards_table(found, sizes))
    for text in (ABOUT, *([] if added else [NO_ACTIVATIONS]), *notes):
        note(console, text)
