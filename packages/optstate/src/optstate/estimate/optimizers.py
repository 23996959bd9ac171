"""The optimizers whose memory is estimated, and each one's bytes for a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from optstate.estimate.count import STORES, count, placements
from optstate.models.model import Model
from optstate.optimizers import parse
from optstate.siblings import MissingExtra
from optstate_codecs import CodedOptimizer

DEFAULTS = (
    "torch.optim.AdamW",
    "stochbf16.AdamW",
    "AdamW8bit",
    "AdamWFp8",
    "AdamW4bit",
    "TurboAdam",
    "Lion8bit",
    "SGD8bit(momentum=0.9)",
)
"""One of each size of state; others, such as Adam's for AdamW, take the same bytes."""
EXACT = "torch.optim.AdamW"
ALL_FLOAT32 = "torch.optim.AdamW, all float32"
"""Parameters and gradients in float32 too, as torch's AdamW has float32 state."""


@dataclass(frozen=True)
class Candidate:
    """An optimizer under its name in the report.

    Attributes:
        name: as it was given.
        make: called with parameters.
        float32: whether the model is in float32, whatever else it is in.
    """

    name: str
    make: Callable[..., Optimizer]
    float32: bool = False


def candidates(
    names: Sequence[str], master_weights: int | None = None
) -> tuple[list[Candidate], list[str]]:
    """The optimizers to estimate.

    Args:
        names: as `parse` takes them; none: `DEFAULTS`, as far as they are installed.
        master_weights: 24 or 32 for optimizers of the family that keep master weights.

    Returns:
        The optimizers, and a note on each default that is not installed.

    Raises:
        ValueError: a name or an argument is not allowed.
        MissingExtra: an optimizer that was named is not installed.
    """
    found, missing = [], []
    for name in names or DEFAULTS:
        try:
            make = parse(name)
        except MissingExtra as error:
            if names:
                raise
            missing.append(f"{name}: {error}")
            continue
        if name == EXACT and not names:
            found.append(Candidate(ALL_FLOAT32, make, float32=True))
        found.append(_with_master_weights(name, make, master_weights))
    return found, missing


def _with_master_weights(name: str, make: Callable[..., Optimizer], bits: int | None) -> Candidate:
    if bits is None or not is_family(make):
        return Candidate(name, make)
    return Candidate(f"{name} + {bits}-bit masters", partial(make, master_weight_bits=bits))


def rows(
    model: Model,
    chosen: Sequence[Candidate],
    stores: Sequence[str],
    activations: int,
    cards: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """The report's rows: each optimizer, store of its state, and gradients kept or released.

    Optimizers that are not of the family have their state on the device.

    Raises:
        ValueError: an optimizer does not take the model's parameters.
    """
    whole = model.in_dtype(torch.float32)
    for one in chosen:
        counted_model = whole if one.float32 else model
        if one.float32 and counted_model == model:
            continue
        try:
            counted = count(counted_model, one.make)
            family = is_family(one.make)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = f"cannot be built for {model.source}: {str(error).splitlines()[0]}"
            raise ValueError(f"{one.name!r}: {reason}") from error
        for where in placements(counted, stores if family else STORES[:1]):
            if where.store in stores:
                yield {"optimizer": one.name} | where.row(counted, activations, cards)


def is_family(make: Callable[..., Optimizer]) -> bool:
    """Whether an optimizer's state can be offloaded with ``optstate_codecs.offload``."""
    cls = make.func if isinstance(make, partial) else make
    return isinstance(cls, type) and issubclass(cls, CodedOptimizer)
