"""What all subcommands share: where output goes, tables, JSON, and errors without tracebacks."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from optstate.files import check_folder
from optstate.siblings import MissingExtra, require

NARROWEST = 100
"""Width of tables in columns if the output is not a terminal."""


def output(stderr: bool = False, width: int = NARROWEST) -> Console:
    """A console; plain text of a fixed width where there is no terminal."""
    console = Console(stderr=stderr, highlight=False)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, highlight=False, width=width)


def print_json(value: Any) -> None:
    """Prints a value as JSON to standard output, and nothing else."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def note(console: Console, text: str) -> None:
    """Prints a line that is not broken and not read as markup."""
    console.print(text, markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    """An empty table whose first ``left`` columns hold words, and the others figures."""
    made = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    for number, name in enumerate(columns):
        if number < left:
            made.add_column(name, no_wrap=True)
        else:
            made.add_column(name, justify="right")
    return made


@contextmanager
def blame(argument: str) -> Iterator[None]:
    """Turns a ``ValueError`` into the usage error of an argument, with exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=argument) from error


@contextmanager
def reported() -> Iterator[None]:
    """Turns a missing package into one line on standard error, with exit code 1."""
    try:
        yield
    except MissingExtra as error:
        complaints = Console(stderr=True)
        complaints.print(f"Missing: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


def require_all(extra: str, *modules: str) -> None:
    """Imports what a subcommand needs.

    Raises:
        typer.Exit: With code 1 if something is not installed.
    """
    with reported():
        for module in modules:
            require(module, extra)


def check_writable(argument: str, path: Path) -> None:
    """Checks before the work that a file can be written there, and its folder be made.

    Raises:
        typer.BadParameter: It cannot.
    """
    try:
        check_folder(path.parent)
        if path.is_dir():
            raise IsADirectoryError(EISDIR, "is a folder")
    except OSError as error:
        problem = f"{path}: {error.strerror or error}"
        raise typer.BadParameter(problem, param_hint=argument) from error


def completion(find: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """A function that completes an argument with those of some words that begin like it."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in find() if word.lower().startswith(incomplete.lower())]

    return complete


def gigabytes(nbytes: int) -> str:
    """Bytes as GB of 10^9, to three figures or so; empty for zero."""
    if not nbytes:
        return ""
    value = nbytes / 1e9
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"
