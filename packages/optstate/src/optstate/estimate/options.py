"""The arguments of ``optstate estimate``."""

from enum import Enum
from typing import Annotated

import typer

from optstate.console import completion
from optstate.estimate.cards import CARDS
from optstate.models.families import NAMED
from optstate.names import CHOICES, SHORT_NAMES


class Store(str, Enum):
    """Where optimizer state is kept."""

    device = "device"
    host = "host"
    disk = "disk"


class Dtype(str, Enum):
    """Dtypes of parameters."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


MODEL_HELP = (
    f"A model's name ({', '.join(NAMED)}); a count of parameters, such as 8B, 124M or 7e9; a"
    " safetensors file, a folder of them or a torch checkpoint; or module:callable, which makes"
    " the model."
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=MODEL_HELP,
        show_default=False,
        autocompletion=completion(lambda: list(NAMED)),
    ),
]
Layers = Annotated[
    int | None,
    typer.Option(min=1, help="Number of layers of a named model, instead of its own."),
]


def estimate(
    model: Model,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Optimizer: {CHOICES}, or module.Class; arguments in brackets, such as"
            ' "TurboAdam(m_bits=3)". Repeat for several. (default: one of each size of state)',
            show_default=False,
            autocompletion=completion(lambda: list(SHORT_NAMES)),
        ),
    ] = None,
    store: Annotated[
        list[Store] | None,
        typer.Option(
            help="Where the state is. Repeat for several. (default: all)", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of parameters and gradients. (default: of the file or module, or bfloat16)",
            show_default=False,
        ),
    ] = None,
    master_weights: Annotated[
        int | None,
        typer.Option(
            metavar="[24|32]",
            help="Bits of master weights of 16-bit parameters.",
            show_default=False,
        ),
    ] = None,
    activations: Annotated[
        str, typer.Option(metavar="BYTES", help="Memory of activations, such as 4GB.")
    ] = "0",
    card: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GB",
            help="Memory of a GPU, such as 24. Repeat for several."
            f" (default: {', '.join(map(str, CARDS))})",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Entry of a torch checkpoint that holds the weights, such as state.model.",
            show_default=False,
        ),
    ] = None,
    layers: Layers = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of tables.")
    ] = False,
) -> None:
    """Count the memory of a training step: optimizers, stores of state, and cards that it fits."""
    from optstate.estimate.command import run

    if master_weights not in (None, 24, 32):
        raise typer.BadParameter(
            f"{master_weights}: must be 24 or 32", param_hint="--master-weights"
        )
    run(
        model,
        optimizers=optimizer or (),
        stores=[one.value for one in store or ()],
        dtype=None if dtype is None else dtype.value,
        master_weights=master_weights,
        activations=activations,
        cards=card or (),
        key=key,
        layers=layers,
        as_json=as_json,
    )
