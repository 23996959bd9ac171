"""The contract of an update rule: the mathematics of an optimizer, without storage."""

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
    """One running statistic that a rule keeps per parameter element.

    Attributes:
        name: the state key in the field's terms, e.g. ``exp_avg``.
        signed: False for statistics that are never negative, such as second moments.
        stream: the random stream that rounds it; the parameter write has stream 0.
        relative_to: the second moment whose root divides this one in the update, if one does.
        plain: ``torch.optim``'s state key for it, where that is another.
    """

    name: str
    signed: bool
    stream: int
    relative_to: str | None = None
    plain: str | None = None


@dataclass(frozen=True)
class Rule(ABC):
    """The mathematics of an optimizer, in float32 (float64 for float64 parameters).

    A rule holds no state; its fields are choices that make it another rule.
    """

    name: ClassVar[str]
    #: a frozen dataclass with a field for each of ``defaults``, which validates them
    hyper_type: ClassVar[type[Any]]
    #: whether ``torch.optim``'s class of the rule counts its steps; a plain checkpoint of one that
    #: does not is taken to be past the first
    counted: ClassVar[bool] = True
    #: whether ``torch.optim`` has a class of the rule, whose bits float32 moments are to give
    in_torch: ClassVar[bool] = False

    @property
    def has_error_feedback(self) -> bool:
        """Whether ``apply_error_feedback`` is to follow the encoding of the moments."""
        return False

    @abstractmethod
    def defaults(self) -> dict[str, Any]:
        """Every hyper-parameter a param group must have, with its default."""

    def hyper(self, group: Mapping[str, Any]) -> Any:
        """The group's hyper-parameters as a ``hyper_type``, validated.

        Raises:
            TypeError, ValueError: a hyper-parameter has a wrong type or value; the message names
                the argument, its value and what is allowed.
        """
        return self.hyper_type(**{key: group[key] for key in self.defaults()})

    @abstractmethod
    def moments(self, hyper: Any) -> tuple[Moment, ...]:
        """The statistics kept under these hyper-parameters."""

    def device_function(self, hyper: Any) -> tuple[Any, int] | None:
        """The update as a device function and its options, or None where there is none.

        ``function(p, g, m0, m1, m2, scalars, OPTIONS)`` returns the new p, m0, m1 and m2. It takes
        float32 tiles, moments in the order of ``moments`` with the last ones unused, and
        ``scalars``, a pointer to the numbers of ``device_row``.
        """
        return None

    def device_error_feedback(self) -> Any:
        """``apply_error_feedback`` as a device function, or None where there is none.

        ``function(p, residual, m1, m2, scalars, OPTIONS)`` returns the new p. Its arguments are
        those of the update's device function.
        """
        return None

    def device_row(self, hyper: Any, step: Scalar) -> list[Scalar]:
        """The scalars of one step that the device function takes; ``scalars`` unless overridden.

        Floats; or 0-d tensors where hyper-parameters or ``step`` are tensors on a device.
        """
        return self.scalars(hyper, step)

    def variant(self, hyper: Any) -> Hashable:
        """What of the hyper-parameters decides which operations ``apply`` does."""
        return None

    @abstractmethod
    def scalars(self, hyper: Any, step: Scalar) -> list[Scalar]:
        """The numbers of one step that ``apply`` takes, folded in float64.

        Floats; or 0-d tensors where hyper-parameters or ``step`` are tensors on a device.
        ``step`` counts from 1.
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
        """Take one step, in place on ``param`` and ``moments``; ``grad`` is only read.

        All tensors are flat slices of the same elements. ``scalars`` and ``variant`` are what the
        methods of these names gave. ``square_root`` takes all roots, ``torch.optim``'s own or
        ``exact.sqrt``.
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
        """Step ``param`` by what storing the first moment has left out, ``residual``; in place.

        The other arguments are ``apply``'s, after it.
        """
        raise NotImplementedError(f"{self.name}: delivers nothing")


def host_scalar(value: Scalar) -> Scalar:
    """A hyper-parameter as a float where the host can read it without waiting for a device."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        # an integer times a number would be of torch's default dtype
        return value.squeeze() if value.is_floating_point() else value.squeeze().to(torch.float32)
    return float(value)
