"""The arguments of ``optstate demo``."""

from pathlib import Path
from typing import Annotated

import typer

from optstate.names import CHOICES


def demo(
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Optimizer to compare with torch.optim.AdamW: {CHOICES}, or module.Class."
            " Repeat for several. (default: AdamW8bit)",
            show_default=False,
        ),
    ] = None,
    optim_args: Annotated[
        str,
        typer.Option(
            help='Arguments of every --optimizer, such as "block_size=256,betas=(0.9,0.95)".',
            show_default=False,
        ),
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 300,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Seeds weights and data order.")] = 0,
    lr: Annotated[float, typer.Option(help="Peak learning rate, the same for all.")] = 1e-3,
    out: Annotated[
        Path, typer.Option(help="PNG to write, or the folder for demo.png; JSON goes beside it.")
    ] = Path("demo.png"),
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="File to learn. (default: Shakespeare's plays)",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of a table.")
    ] = False,
) -> None:
    """Train a small GPT on real text with AdamW and with compressed optimizers, side by side."""
    from optstate.demo.command import run
    from optstate.demo.settings import DEFAULT_OPTIMIZERS, Settings, picture_path

    try:
        settings = Settings(
            optimizers=tuple(optimizer or DEFAULT_OPTIMIZERS),
            steps=steps,
            device=device,
            seed=seed,
            lr=lr,
            text=text,
            optim_args=optim_args,
        )
        picture = picture_path(out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    run(settings, picture, as_json)
