"""What the engine is given: one parameter's share of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from optstate_codecs.formats import Format
from optstate_codecs.rules import Rule

__all__ = ["Unit"]


@dataclass(frozen=True)
class Unit:
    """One parameter to step, with all that the step needs.

    Attributes:
        param: the parameter, any real floating dtype and layout.
        grad: its gradient, same shape and device.
        state: ``optimizer.state[param]``: ``step`` and the components of every moment.
        rule: the mathematics.
        hyper: the group's validated hyper-parameters, as ``rule.hyper`` returns them.
        formats: the format of each moment.
        write: how the parameter is rounded, see ``optstate_codecs.writes``.
        seed: the optimizer's ``rounding_seed``.
        index: the parameter's place in the optimizer, counted over all groups.
        grad_scale: what the gradient is to be divided by, or None.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    rule: Rule
    hyper: Any
    formats: Mapping[str, Format] = field(default_factory=dict)
    write: str = "nearest"
    seed: int = 0
    index: int = 0
    grad_scale: Tensor | None = None
