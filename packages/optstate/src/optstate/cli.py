"""The ``optstate`` command. Each subcommand imports its dependencies when it runs."""

from typing import Annotated

import typer

from optstate import __version__
from optstate.bench.options import bench
from optstate.convert.options import convert
from optstate.demo.options import demo
from optstate.estimate.options import estimate
from optstate.inspection.options import inspect

app = typer.Typer(
    name="optstate",
    help="PyTorch optimizers with compressed state.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(estimate)
app.command()(bench)
app.command()(convert)
app.command()(inspect)
app.command()(demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"optstate {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """PyTorch optimizers with compressed state."""
