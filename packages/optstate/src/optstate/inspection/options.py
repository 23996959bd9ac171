"""The arguments of ``optstate inspect``."""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True,
            readable=True,
            metavar="FILE",
            help="A torch file with an optimizer's state dict, or with one in an entry; a file of"
            " save_safetensors; the file of a disk store, or its manifest; or the folder of a"
            " distributed checkpoint.",
            show_default=False,
        ),
    ],
    key: Annotated[
        str | None,
        typer.Option(
            help="Entry of a torch file with the state dict, or of a distributed checkpoint."
            " (default: as in optstate convert)",
            show_default=False,
        ),
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every parameter's state.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of tables.")
    ] = False,
) -> None:
    """Show the optimizer state in a file: formats, bits, bytes and steps."""
    from optstate.inspection.command import run

    run(file, key=key, tensors=tensors, as_json=as_json)
