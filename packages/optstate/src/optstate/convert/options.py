"""The arguments of ``optstate convert``."""

from pathlib import Path
from typing import Annotated

import typer

from optstate.console import completion
from optstate.convert.names import LIBRARIES
from optstate.names import CHOICES, SHORT_NAMES


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            readable=True,
            metavar="SOURCE",
            help="A torch file with an optimizer's state dict, or with one in an entry; or a"
            " safetensors file of save_safetensors.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            help="File to write. .safetensors: packed state as save_safetensors writes it; else a"
            " torch file with all that SOURCE has, and the optimizer's state replaced.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help=f"torch for the layout of torch.optim; or a class of the family: {CHOICES}, or"
            " module.Class; arguments in brackets.",
            autocompletion=completion(lambda: ["torch", *SHORT_NAMES]),
            show_default=False,
        ),
    ],
    library: Annotated[
        str | None,
        typer.Option(
            "--from",
            help=f"Library that wrote SOURCE: {', '.join(LIBRARIES)}. (default: found from its"
            " entries)",
            autocompletion=completion(lambda: list(LIBRARIES)),
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Entry of SOURCE with the optimizer's state dict, such as optimizers.0."
            " (default: SOURCE itself, or optimizer, optimizer_state_dict, optim or"
            " optimizer_states.0)",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model, as in optstate estimate, for shapes of parameters that packed state"
            " does not tell.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite TARGET.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of text.")
    ] = False,
) -> None:
    """Convert an optimizer's checkpoint from torch or another library to the family, or back."""
    from optstate.convert.command import run

    run(
        source,
        target,
        to=to,
        library=library,
        key=key,
        shapes=shapes,
        force=force,
        as_json=as_json,
    )
