"""Policies: the codec of each state key, and the step from which it is used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.formats import Format
from optstate_codecs.plain import plain_value
from optstate_wrap.codecs import Codec, IdentityCodec, Int8MomentumCodec, as_codec

__all__ = ["AdaptiveWarmupPolicy", "ConfigurablePolicy", "Policy", "WarmupPolicy"]

AnyCodec = Codec | Format | str | None
#: state keys of values by which, or by whose root, optimizers divide
VARIANCES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "ema_squared", "exp_inf", "sum")


class Policy(ABC):
    """Chooses how the state of each parameter is stored.

    Attributes:
        device_resident: False stores state in host memory, unless the wrapper's ``store`` is given.
    """

    device_resident: bool | None = None

    @abstractmethod
    def get_codecs(
        self, param: Tensor, state: Mapping[str, Any], step: int
    ) -> Mapping[str, AnyCodec]:
        """The codec of each state key; keys without one stay exact.

        Only tensors with one number per element are encoded. Other values, such as 0-d step counts
        and factored moments, stay exact even if their key has a codec.

        Args:
            param: the parameter.
            state: state of the parameter, or of a chunk of it, after the optimizer's step.
            step: number of steps that the wrapper had taken before this one.
        """

    def compressing(self, step: int) -> bool:
        """Whether any state is encoded at this step."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """The policy's progress, in plain numbers."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore saved progress."""
        return None


class WarmupPolicy(Policy):
    """Exact state for some steps; then an int8 first moment and optionally a coded second moment.

    Args:
        warmup_steps: number of steps with exact state.
        momentum_key: state key of the first moment, or a tuple of the keys that it may have.
        variance_key: state key of the second moment.
        variance_codec: codec of the second moment; None is exact.
        min_int8_elements: smaller tensors have ``small_tensor_codec`` for both moments.
        small_tensor_codec: None is exact.
        device_resident: False stores state in host memory.
        momentum_codec: codec of the first moment; None is ``Int8MomentumCodec()``.

    Raises:
        ValueError: a codec rounds small second moments to zero, which makes steps of thousands of
            learning rates.
    """

    def __init__(
        self,
        warmup_steps: int = 100,
        momentum_key: str | tuple[str, ...] = "exp_avg",
        variance_key: str = "exp_avg_sq",
        variance_codec: AnyCodec = None,
        min_int8_elements: int = 4096,
        small_tensor_codec: AnyCodec = None,
        device_resident: bool | None = None,
        *,
        momentum_codec: AnyCodec = None,
    ) -> None:
        self.warmup_steps = checks.whole_number("warmup_steps", warmup_steps)
        self.momentum_keys = (momentum_key,) if isinstance(momentum_key, str) else momentum_key
        self.variance_key = variance_key
        momentum = Int8MomentumCodec() if momentum_codec is None else as_codec(momentum_codec)
        variance = checked(VARIANCES[0], as_codec(variance_codec))
        self.min_int8_elements = checks.whole_number("min_int8_elements", min_int8_elements)
        self.device_resident = plain_value(device_resident)
        small = as_codec(small_tensor_codec)
        self._large = self._codecs(momentum, variance)
        self._small = self._codecs(small, checked(VARIANCES[0], small))

    def _codecs(self, momentum: Codec, variance: Codec) -> dict[str, AnyCodec]:
        momenta = {key: checked(key, momentum) for key in self.momentum_keys}
        return {**momenta, self.variance_key: variance}

    def compressing(self, step: int) -> bool:
        return step >= self.warmup_steps

    def get_codecs(
        self, param: Tensor, state: Mapping[str, Any], step: int
    ) -> Mapping[str, AnyCodec]:
        if not self.compressing(step):
            return {}
        return self._small if param.numel() < self.min_int8_elements else self._large


class AdaptiveWarmupPolicy(WarmupPolicy):
    """``WarmupPolicy`` that begins compression when the loss stops falling.

    Args:
        patience: compression begins after this many losses in a row without improvement.
        tol: a loss improves if it is below the best one by more than this.
        warmup_steps: compression begins after this many steps at the latest.
        **options: other arguments of ``WarmupPolicy``.

    Attributes:
        active: whether a plateau or ``activate_compression`` has begun compression.
    """

    def __init__(
        self,
        warmup_steps: int = 100,
        *args: Any,
        patience: int = 5,
        tol: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(warmup_steps, *args, **options)
        checks.nonnegative("tol", tol)
        self.patience = checks.whole_number("patience", patience)
        self.tol = plain_value(tol)
        self.active = False
        self._best = float("inf")
        self._waited = 0

    def update_on_loss(self, loss: float) -> bool:
        """Record a loss; return whether compression is active."""
        if float(loss) < self._best - self.tol:
            self._best, self._waited = float(loss), 0
        else:
            self._waited += 1
        self.active = self.active or self._waited >= self.patience
        return self.active

    def activate_compression(self) -> None:
        """Begin compression with the next step."""
        self.active = True

    def compressing(self, step: int) -> bool:
        return self.active or super().compressing(step)

    def state_dict(self) -> dict[str, Any]:
        return {"active": self.active, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.active = bool(state_dict["active"])
        self._best = float(state_dict["best"])
        self._waited = int(state_dict["waited"])


class ConfigurablePolicy(Policy):
    """Codecs from a mapping by state key.

    Args:
        codecs_map: codecs, formats or their texts; None is exact.
        default_codec: codec of keys that are not in the mapping.
        warmup_steps: number of steps with exact state.

    Examples:
        >>> ConfigurablePolicy({"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)"})
    """

    def __init__(
        self,
        codecs_map: Mapping[str, AnyCodec],
        default_codec: AnyCodec = None,
        warmup_steps: int = 0,
    ) -> None:
        self.warmup_steps = checks.whole_number("warmup_steps", warmup_steps)
        self._codecs = {key: as_codec(codec) for key, codec in codecs_map.items()}
        for key, codec in self._codecs.items():
            checked(key, codec)
        self._default = as_codec(default_codec)
        codecs = (self._default, *self._codecs.values())
        self._exact = all(codec.stored is None for codec in codecs)

    def compressing(self, step: int) -> bool:
        return step >= self.warmup_steps

    def get_codecs(
        self, param: Tensor, state: Mapping[str, Any], step: int
    ) -> Mapping[str, AnyCodec]:
        if self._exact or not self.compressing(step):
            return {}
        default = {key: self._default_of(key) for key in state if key not in self._codecs}
        return {**self._codecs, **default}

    def _default_of(self, key: str) -> Codec:
        """The default codec if it fits the values of this key, else an exact one."""
        format = self._default.stored
        return self._default if format is None or not _unfit(key, format) else IdentityCodec()


def checked(key: str, codec: Codec) -> Codec:
    """Return the codec, or raise if it does not fit the values under ``key``."""
    format = codec.stored
    if format is not None and (why := _unfit(key, format)):
        raise ValueError(f"codec of {key!r}={format.spec!r}: {why}")
    return codec


def _unfit(key: str, format: Format) -> str:
    """Why a format does not fit the values under ``key``; "" if it does."""
    if key in VARIANCES and not format.keeps_positive:
        return (
            "rounds small second moments to zero, which makes steps of thousands of learning "
            "rates; use an unsigned format"
        )
    if key not in VARIANCES and not format.keeps_sign:
        return "holds no negative numbers; use a signed format"
    return ""
