"""Adam and AdamW in 8-bit, 4-bit and FP8; each class selects formats for the two moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor

from optstate_codecs import FP8, Adam, CodedOptimizer, Dynamic8, Format, Int4, Minifloat, checks
from optstate_codecs.formats import CoState, as_format
from optstate_codecs.writes import write_named

__all__ = [
    "Adam4bit",
    "Adam8",
    "Adam8bit",
    "AdamFp8",
    "AdamW4bit",
    "AdamW8",
    "AdamW8bit",
    "AdamWFp8",
]


MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _checked(formats: Any) -> Mapping[str, Format | str]:
    """Return ``formats``; raise unless it maps names of moments."""
    if not isinstance(formats, Mapping):
        raise TypeError(
            f"formats={formats!r}: must map names of moments to formats, "
            f"got {type(formats).__name__}"
        )
    if unknown := [name for name in formats if name not in MOMENTS]:
        raise ValueError(
            f"formats[{unknown[0]!r}]: unknown moment, must be one of {', '.join(MOMENTS)}"
        )
    return formats


@lru_cache(maxsize=64)
def _formats_of(cls: type[_CodedAdam], block_size: int) -> tuple[Format, Format]:
    """A class's formats; cached, because every step needs them."""
    return cls.moment_formats(block_size)


class _CodedAdam(CodedOptimizer):
    """Adam's arguments; subclasses define the formats of the moments."""

    rule_type = Adam
    storage_options = ("block_size", "formats")
    decoupled: ClassVar[bool] = False
    default_block_size: ClassVar[int] = 2048
    # whether the class takes ``error_feedback``
    takes_error_feedback: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        block_size: int | None = None,
        formats: Mapping[str, Format | str] | None = None,
        bf16_stochastic_round: bool = False,
        master_weight_bits: int | None = None,
        **options: Any,
    ) -> None:
        feedback = self.takes_error_feedback and options.pop("error_feedback")
        super().__init__(
            params,
            Adam(decoupled=self.decoupled, error_feedback=feedback),
            _checked({} if formats is None else formats),
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            block_size=self.default_block_size if block_size is None else block_size,
            write=write_named(bf16_stochastic_round, master_weight_bits),
            **options,
        )

    @classmethod
    def moment_formats(cls, block_size: int) -> tuple[Format, Format]:
        """The formats of the first and of the second moment."""
        raise NotImplementedError

    def group_formats(self, group: Mapping[str, Any]) -> dict[str, Format]:
        cls: Any = type(self)
        first, second = _formats_of(cls, checks.block_size(group["block_size"]))
        chosen = {name: as_format(f) for name, f in _checked(group["formats"]).items()}
        formats = {"exp_avg": first, "exp_avg_sq": second, **chosen}
        formats.setdefault("max_exp_avg_sq", formats["exp_avg_sq"])
        names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
        return {name: formats[name] for name in names}


class _CodedAdamW(_CodedAdam):
    """``_CodedAdam`` with decoupled weight decay and AdamW's default for it."""

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class _Dynamic8Moments(CodedOptimizer):
    @classmethod
    def moment_formats(cls, block_size: int) -> tuple[Format, Format]:
        return Dynamic8.first_moment(block_size), Dynamic8.second_moment(block_size)


class Adam8bit(_Dynamic8Moments, _CodedAdam):
    """Adam with 8 bits per moment (16 + 64 / block_size bits per parameter).

    Both moments are stored in the dynamic exponent map of Dettmers et al., arXiv:2110.02861, the
    second as its root. Rounding is stochastic, which keeps step lengths unbiased; rounding to
    nearest loses the small changes of a running mean.

    Args:
        params: tensors, ``named_parameters()``, or dicts of param groups; float16, bfloat16,
            float32 or float64.
        lr: learning rate, at least 0; a float or one-element tensor.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: added to the gradient times the parameter (coupled), at least 0.
        amsgrad: divide by the largest second moment so far; 8 more bits per parameter.
        block_size: elements that share a scale, a power of two from 16 to 8192; default 2048.
            Can be set per group.
        formats: other formats for the moments that it names: ``exp_avg``, ``exp_avg_sq`` and,
            with ``amsgrad``, ``max_exp_avg_sq``, which by default has the format of
            ``exp_avg_sq``. Each is a ``Format`` or its text, e.g. ``{"exp_avg": "bf16"}``, with
            its own block size. Can be set per group.
        bf16_stochastic_round: round bfloat16 parameters stochastically, so that steps below
            their precision are kept in the mean.
        master_weight_bits: 24 or 32 keeps the rounding error of bfloat16 and float16 parameters,
            in 1 or 2 bytes each, and trains the master weight of that many bits that both make
            up; not together with ``bf16_stochastic_round``.
        **options: ``backend``, ``maximize``, ``skip_nonfinite``, ``max_grad_norm``,
            ``rounding_seed`` (see ``CodedOptimizer``) and the flags ``foreach``, ``fused``,
            ``capturable``, ``differentiable``.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.

    Examples:
        >>> optimizer = Adam8bit(model.parameters(), lr=1e-3)
    """


class AdamW8bit(_Dynamic8Moments, _CodedAdamW):
    """AdamW with 8 bits per moment (16 + 64 / block_size bits per parameter).

    Weight decay is decoupled (Loshchilov & Hutter, arXiv:1711.05101). Other arguments are those of
    ``Adam8bit``.

    Args:
        weight_decay: the parameter is multiplied by ``1 - lr * weight_decay`` before the step; at
            least 0.

    Examples:
        >>> optimizer = AdamW8bit(model.parameters(), lr=3e-4, weight_decay=0.1)
    """


class Adam8(Adam8bit):
    """``Adam8bit`` under a name that other libraries do not take for bitsandbytes', see ``AdamW8``.

    Examples:
        >>> optimizer = Adam8(model.parameters(), lr=1e-3)
    """


class AdamW8(AdamW8bit):
    """``AdamW8bit`` under a name that other libraries do not take for bitsandbytes'.

    Some compare the name of the class with ``AdamW8bit``, or look whether it ends in ``8bit``, and
    then import bitsandbytes: ``create_loraplus_optimizer`` of PEFT, and the kohya scripts. State
    dicts of the two classes are the same.

    Examples:
        >>> optimizer = create_loraplus_optimizer(
        ...     model, AdamW8, lr=2e-4, loraplus_lr_ratio=16
        ... )
    """


class _FourBitMoments(CodedOptimizer):
    default_block_size: ClassVar[int] = 128
    takes_error_feedback: ClassVar[bool] = True

    def group_formats(self, group: Mapping[str, Any]) -> dict[str, Format]:
        formats = super().group_formats(group)
        if self.rule.has_error_feedback and "exp_avg" not in group["formats"]:
            formats["exp_avg"] = CoState(4, group["block_size"], levels="normal")
        return formats

    @classmethod
    def moment_formats(cls, block_size: int) -> tuple[Format, Format]:
        return Int4.first_moment(block_size), Minifloat.second_moment4(block_size)


class Adam4bit(_FourBitMoments, _CodedAdam):
    """Adam with 4 bits per moment (8 + 32 / block_size bits per parameter).

    A byte holds two codes. The first moment is stored in update units, as an integer from -7 to
    7; the second as its root, in floating-point codes of two exponent and two mantissa bits. Both
    are rounded stochastically, the first with random numbers mirrored every other step. Step
    lengths are within 5 % of exact Adam's, and shorter where second moments in one block differ by
    a factor of more than 1,000.

    The second moment as published by Li et al., arXiv:2309.01507, is
    ``formats={"exp_avg_sq": "linear4(normalization=rank1)"}``. Other arguments are those of
    ``Adam8bit``.

    ``error_feedback=True`` applies the rounding error of the first moment to the parameter in the
    same step, so that the sum of all steps stays Adam's; nothing is stored for it. The error is
    multiplied by beta1 / (1 - beta1), so the first moment is then rounded to the nearest of the
    levels with the smallest squared error, ``costate(bits=4, levels=normal)``, unless ``formats``
    names another.

    Args:
        amsgrad: divide by the largest second moment so far; 4 more bits per parameter.
        block_size: elements that share a scale, a power of two from 16 to 8192; default 128, 8.25
            bits per parameter. 64 takes 8.5 bits and follows unequal gradients more closely. Can be
            set per group.
        error_feedback: apply the rounding error of the first moment in the same step.

    Examples:
        >>> optimizer = Adam4bit(model.parameters(), lr=1e-3)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        error_feedback: bool = False,
        **options: Any,
    ) -> None:
        options["error_feedback"] = checks.flag("error_feedback", error_feedback)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class AdamW4bit(_FourBitMoments, _CodedAdamW):
    """AdamW with 4 bits per moment (8 + 32 / block_size bits per parameter).

    ``Adam4bit`` with the decoupled weight decay of ``AdamW8bit``. Other arguments are those of
    ``Adam4bit``.

    Args:
        weight_decay: the parameter is multiplied by ``1 - lr * weight_decay`` before the step; at
            least 0.

    Examples:
        >>> optimizer = AdamW4bit(model.parameters(), lr=3e-4, weight_decay=0.1)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        error_feedback: bool = False,
        **options: Any,
    ) -> None:
        options["error_feedback"] = checks.flag("error_feedback", error_feedback)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class _Fp8Moments(CodedOptimizer):
    @classmethod
    def moment_formats(cls, block_size: int) -> tuple[Format, Format]:
        return FP8.first_moment(block_size), Dynamic8.second_moment(block_size)


class AdamFp8(_Fp8Moments, _CodedAdam):
    """Adam with FP8 state (16 + 64 / block_size bits per parameter), on any device.

    The first moment is stored as ``float8_e4m3fn`` in update units, encoded and decoded with
    integer arithmetic, so that FP8 hardware is not needed. The second needs finer steps than e4m3
    has and is stored as in ``Adam8bit``. Arguments are those of ``Adam8bit``.

    Examples:
        >>> optimizer = AdamFp8(model.parameters(), lr=1e-3)
    """


class AdamWFp8(_Fp8Moments, _CodedAdamW):
    """AdamW with FP8 state (16 + 64 / block_size bits per parameter), on any device.

    ``AdamFp8`` with decoupled weight decay. Arguments are those of ``AdamW8bit``.

    Examples:
        >>> optimizer = AdamWFp8(model.parameters(), lr=3e-4, weight_decay=0.1)
    """
