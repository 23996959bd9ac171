"""The interface of an update rule: the mathematics of an optimizer, without storage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Moment", "Rule", "host_scalar"]

Scalar = float | Tensor
SquareRoot = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Moment:
    """One running statistic that a rule keeps for every parameter element.

    Attributes:
        name: its state key, e.g. ``exp_avg``.
        signed: False for statistics that are never negative, such as second moments.
        stream: the random stream that rounds it; the parameter write uses stream 0.
        relative_to: the second moment whose root divides this moment in the update, or None.
        plain: its state key in ``torch.optim``, where that differs from ``name``.
    """

    name: str
    signed: bool
    stream: int
    relative_to: str | None = None
    plain: str | None = None


@dataclass(frozen=True)
class Rule(ABC):
    """The mathematics of an optimizer, in float32 (float64 for float64 parameters).

    A rule holds no state. Its fields select a variant of the rule.
    """

    name: ClassVar[str]
    #: a frozen dataclass with a field for each of ``defaults``, which validates them
    hyper_type: ClassVar[type[Any]]
    #: whether ``torch.optim``'s class of the rule counts steps; plain checkpoints of a class that
    #: does not are assumed to be past the first step
    counted: ClassVar[bool] = True
    #: whether ``torch.optim`` has a class of the rule; float32 moments then give its bits
    in_torch: ClassVar[bool] = False

    @property
    def has_error_feedback(self) -> bool:
        """Whether ``apply_error_feedback`` is called after the moments, if any, are encoded."""
        return False

    @abstractmethod
    def defaults(self) -> dict[str, Any]:
        """The hyper-parameters of a param group with their defaults."""

    def hyper(self, group: Mapping[str, Any]) -> Any:
        """The group's hyper-parameters as a ``hyper_type``, validated.

        Raises:
            TypeError, ValueError: a hyper-parameter has a wrong type or value; the message names
                the argument, its value and what is allowed.
        """
        return self.hyper_type(**{key: group[key] for key in self.defaults()})

    @abstractmethod
    def moments(self, hyper: Any) -> tuple[Moment, ...]:
        """The moments that are kept with these hyper-parameters."""

    def device_function(self, hyper: Any) -> tuple[Any, int] | None:
        """The update as a device function and its OPTIONS, or None if there is none.

        ``function(p, g, m0, m1, m2, scalars, OPTIONS)`` returns the new p, m0, m1 and m2. It takes
        float32 tiles, moments in the order of ``moments`` with the last ones unused, and
        ``scalars``, a pointer to the numbers of ``device_row``.
        """
        return None

    def device_error_feedback(self) -> Any:
        """The factor of ``apply_error_feedback`` as a device function, or None if there is none.

        ``function(m1, m2, scalars, OPTIONS)`` returns the number by which the kernel multiplies
        the residual and adds it to p, a tile or a scalar. Its arguments are those of the update's
        device function, after the update.
        """
        return None

    def device_row(self, hyper: Any, step: Scalar) -> list[Scalar]:
        """The numbers of one step that the device function takes; by default ``scalars``.

        They are floats, or 0-d tensors where hyper-parameters or ``step`` are device tensors.
        """
        return self.scalars(hyper, step)

    def variant(self, hyper: Any) -> Hashable:
        """The hyper-parameters that decide which operations ``apply`` executes."""
        return None

    @abstractmethod
    def scalars(self, hyper: Any, step: Scalar) -> list[Scalar]:
        """The numbers of one step that ``apply`` takes, computed in float64.

        They are floats, or 0-d tensors where hyper-parameters or ``step`` are device tensors.
        ``step`` counts from 1. A step size is negative, since ``apply`` adds its multiple.
        """

    @abstractmethod
    def apply(
        self,
        param: Tensor,
        grad: Tensor,
        moments: Mapping[str, Tensor],
        scalars: Sequence[Scalar],
        variant: Any,
        square_root: SquareRoot = torch.sqrt,
    ) -> None:
        """Take one step in place on ``param`` and ``moments``; ``grad`` is only read.

        Tensors are flat slices of the same elements; ``moments`` has them by name. ``scalars`` and
        ``variant`` are results of the methods with these names. ``square_root`` computes all roots:
        ``torch.sqrt`` as in ``torch.optim``, or ``exact.sqrt``.
        """

    def apply_error_feedback(
        self,
        param: Tensor,
        residual: Tensor,
        moments: Mapping[str, Tensor],
        scalars: Sequence[Scalar],
        variant: Any,
        square_root: SquareRoot = torch.sqrt,
    ) -> None:
        """Step ``param`` in place by the error of storing the first moment.

        ``residual`` is the first moment minus its stored value. The other arguments are those of
        ``apply``, after it has run.
        """
        raise NotImplementedError(f"{self.name}: has no error feedback")


def host_scalar(value: Scalar) -> Scalar:
    """A hyper-parameter as a float, unless reading it would wait for a device."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        # an integer tensor times a number would have torch's default dtype
        return value.squeeze() if value.is_floating_point() else value.squeeze().to(torch.float32)
    return float(value)
