"""The arguments of ``optstate bench``."""

from pathlib import Path
from typing import Annotated

import typer

from optstate.console import completion
from optstate.estimate.options import MODEL_HELP, Dtype, Layers
from optstate.models.families import NAMED
from optstate.names import CHOICES, SHORT_NAMES


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help=MODEL_HELP,
            autocompletion=completion(lambda: list(NAMED)),
        ),
    ] = "gpt2",
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            help='A name of the table, such as "torch fused", torchao or bitsandbytes;'
            f" or {CHOICES}, or module.Class, with arguments in brackets. Repeat for several."
            " (default: torch's, ours and every other library that is installed)",
            show_default=False,
            autocompletion=completion(lambda: list(SHORT_NAMES)),
        ),
    ] = None,
    layers: Layers = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of parameters and gradients.")
    ] = Dtype.bfloat16,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N. (default: cuda where there is one)", show_default=False
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Steps that are timed, at most.")] = 10,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for each optimizer; slow ones take fewer steps.")
    ] = 20,
    out: Annotated[
        Path | None, typer.Option(help="File to write the JSON to.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of a table.")
    ] = False,
) -> None:
    """Time optimizer steps on this machine, and compare them with the speed of a copy."""
    from optstate.bench.command import run

    run(
        model,
        optimizers=optimizer or (),
        layers=layers,
        dtype=dtype.value,
        device=device,
        repeats=repeats,
        seconds=seconds,
        out=out,
        as_json=as_json,
    )
