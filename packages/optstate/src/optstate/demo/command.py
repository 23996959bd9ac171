"""Runs ``optstate demo``: checks the options, trains, and shows and saves the results.

All checks come before the first step, and show no traceback. A wrong option ends the command with
its usage and exit code 2; a missing package or file ends it with one line and exit code 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from optstate.demo.settings import BASELINE, Settings
from optstate.siblings import MissingExtra, require

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from optstate.demo.data import Corpus

    Make = Callable[..., Optimizer]

NARROWEST = 100
"""Width of the table in columns if the output is not a terminal."""


def run(settings: Settings, picture: Path, as_json: bool) -> None:
    """Trains, reports and saves.

    Args:
        settings: What to train.
        picture: The PNG to write; the JSON goes beside it under the same name.
        as_json: Print the JSON to standard output, and everything else to standard error.

    Raises:
        typer.BadParameter: An option's value is not allowed.
        typer.Exit: With code 1 if something is not installed.
    """
    try:
        for module in ("torch", "matplotlib", "optstate_codecs"):
            require(module)
        from optstate.demo.data import MissingText
    except MissingExtra as error:
        raise _missing(error) from error
    try:
        optimizers = _optimizers(settings)
        corpus = _corpus(settings)
    except (MissingExtra, MissingText) as error:
        raise _missing(error) from error
    _check_folder(picture.parent)
    _train_and_show(optimizers, corpus, settings, picture, as_json)


def _missing(error: Exception) -> typer.Exit:
    complaints = Console(stderr=True)
    complaints.print(f"Missing: {error}", style="bold red", markup=False, soft_wrap=True)
    return typer.Exit(1)


def _optimizers(settings: Settings) -> "list[tuple[str, Make]]":
    from optstate.demo.device import check_device
    from optstate.demo.optimizers import check_usable, in_order, resolve, with_arguments

    with _blame("--device"):
        check_device(settings.device)
    with _blame("--optimizer"):
        baseline, *others = in_order(BASELINE, settings.optimizers)
        classes = {name: resolve(name) for name in (baseline, *others)}
    with _blame("--optim-args"):
        if settings.optim_args and not others:
            raise ValueError(f"{settings.optim_args!r}: for none; they are not the baseline's")
        compared = [(name, with_arguments(classes[name], settings.optim_args)) for name in others]
    chosen: list[tuple[str, Make]] = [(baseline, classes[baseline]), *compared]
    with _blame("--optimizer"):
        for name, make in chosen:
            check_usable(name, make, settings.lr)
    return chosen


@contextmanager
def _blame(option: str) -> Iterator[None]:
    """Turns a ``ValueError`` into the usage error of an option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _corpus(settings: Settings) -> "Corpus":
    from optstate.demo.data import Corpus, MissingText, load_documents

    try:
        return Corpus.from_documents(load_documents(settings.text), settings.context)
    except MissingText as error:
        if settings.text is None:
            raise
        raise typer.BadParameter(str(error), param_hint="--text") from error


def _check_folder(folder: Path) -> None:
    """Checks before training that a folder can be made, so that an error costs no time."""
    from optstate.demo.output import check_folder

    try:
        check_folder(folder)
    except OSError as error:
        problem = f"{folder}: {error.strerror or error}"
        raise typer.BadParameter(problem, param_hint="--out") from error


def _train_and_show(
    optimizers: "list[tuple[str, Make]]",
    corpus: "Corpus",
    settings: Settings,
    picture: Path,
    as_json: bool,
) -> None:
    from optstate.demo.compare import compare
    from optstate.demo.output import write_files
    from optstate.demo.plot import png
    from optstate.demo.report import table, to_json

    console = Console(stderr=as_json)
    if not console.is_terminal:
        console = Console(stderr=as_json, width=NARROWEST)
    comparison = compare(optimizers, corpus, settings, console)

    results = picture.with_suffix(".json")
    text = to_json(comparison)
    write_files({results: f"{text}\n".encode(), picture: png(comparison)})
    if as_json:
        typer.echo(text)
    else:
        console.print(table(comparison))
    console.print(f"Saved {picture} and {results}", highlight=False, soft_wrap=True)
