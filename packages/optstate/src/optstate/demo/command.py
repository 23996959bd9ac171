"""Runs ``optstate demo``: checks the options, trains, and shows and saves the results.

All checks come before the first step, and show no traceback. A wrong option ends the command with
its usage and exit code 2; a missing package or file ends it with one line and exit code 1.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from optstate.console import blame, check_writable, note, output, reported, require_all
from optstate.demo.settings import BASELINE, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from optstate.demo.data import Corpus

    Make = Callable[..., Optimizer]


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
    require_all("demo", "torch", "matplotlib", "optstate_codecs")
    with reported():
        optimizers = _optimizers(settings)
    corpus = _corpus(settings)
    check_writable("--out", picture)
    _train_and_show(optimizers, corpus, settings, picture, as_json)


def _optimizers(settings: Settings) -> "list[tuple[str, Make]]":
    from optstate.device import check_device
    from optstate.optimizers import check_usable, in_order, resolve, with_arguments

    with blame("--device"):
        check_device(settings.device)
    with blame("--optimizer"):
        baseline, *others = in_order(BASELINE, settings.optimizers)
        classes = {name: resolve(name) for name in (baseline, *others)}
    with blame("--optim-args"):
        if settings.optim_args and not others:
            raise ValueError(f"{settings.optim_args!r}: for none; they are not the baseline's")
        compared = [(name, with_arguments(classes[name], settings.optim_args)) for name in others]
    chosen: list[tuple[str, Make]] = [(baseline, classes[baseline]), *compared]
    with blame("--optimizer"):
        for name, make in chosen:
            check_usable(name, make, settings.lr)
    return chosen


def _corpus(settings: Settings) -> "Corpus":
    from optstate.demo.data import Corpus, MissingText, load_documents

    try:
        return Corpus.from_documents(load_documents(settings.text), settings.context)
    except MissingText as error:
        raise typer.BadParameter(str(error), param_hint="--text") from error


def _train_and_show(
    optimizers: "list[tuple[str, Make]]",
    corpus: "Corpus",
    settings: Settings,
    picture: Path,
    as_json: bool,
) -> None:
    from optstate.demo.compare import compare
    from optstate.demo.data import source_of_text
    from optstate.demo.plot import png
    from optstate.demo.report import table, to_json
    from optstate.files import write_files

    console = output(stderr=as_json)
    note(console, f"Text: {source_of_text(settings.text)}")
    comparison = compare(optimizers, corpus, settings, console)

    results = picture.with_suffix(".json")
    text = to_json(comparison)
    write_files({results: f"{text}\n".encode(), picture: png(comparison)})
    if as_json:
        typer.echo(text)
    else:
        console.print(table(comparison))
    console.print(f"Saved {picture} and {results}", highlight=False, soft_wrap=True)
