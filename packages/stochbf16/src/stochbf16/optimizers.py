"""Optimizers with bfloat16 state and parameters, rounded stochastically."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from optstate_codecs import BF16, CodedOptimizer, Format, Rule, checks, rules
from optstate_codecs.writes import write_named

__all__ = ["SGD", "Adam", "AdamW", "Compass", "LPFAdamW", "Lion", "RMSProp"]

NAMES = ("ema", "ema_squared", "max_ema_squared")
DECAY_MODES = ("plain", "bias_corrected")


class _PureBF16(CodedOptimizer):
    """The base of optimizers whose moments are all bfloat16."""

    storage_options = ()

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule,
        *,
        master_weight_bits: int | None = None,
        **options: Any,
    ) -> None:
        write = write_named(master_weight_bits is None, master_weight_bits)
        super().__init__(params, rule, write=write, **options)

    def group_formats(self, group: Mapping[str, Any]) -> dict[str, Format]:
        moments = self.rule.moments(self.rule.hyper(group))
        return {moment.name: BF16(rounding="stochastic") for moment in moments}


class AdamW(_PureBF16):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) with bfloat16 state: 4 bytes a parameter.

    Arithmetic is float32. Both moments, ``ema`` and ``ema_squared``, and bfloat16 parameters are
    rounded stochastically, so that changes below bfloat16's precision are kept in the mean.
    Parameters of other dtypes keep their dtype and are rounded to nearest.

    Args:
        params: tensors, ``named_parameters()``, or dicts of param groups; bfloat16, float16,
            float32 or float64.
        lr: learning rate, at least 0; a float or one-element tensor.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: the parameter is multiplied by ``1 - lr * weight_decay``; at least 0.
        centralization: share, from 0 to 1, of the gradient's mean over all dimensions but the first
            that is subtracted from it, for tensors of two dimensions or more (1: Yong et al.,
            arXiv:2004.01461).
        weight_decay_mode: "plain", or "bias_corrected" for a decay by ``lr / (1 - beta1^t)``, as in
            torchastic: ten times ``lr`` at first.
        master_weight_bits: 24 or 32 stores the rounding error of bfloat16 and float16 parameters,
            in 1 or 2 bytes each, instead of rounding stochastically.
        **options: ``amsgrad``, ``maximize``, ``rounding_seed``, ``backend``, ``skip_nonfinite``,
            ``max_grad_norm`` (see ``CodedOptimizer``), and the flags ``foreach``, ``fused``,
            ``capturable``, ``differentiable``.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.

    Examples:
        >>> optimizer = AdamW(model.to(torch.bfloat16).parameters(), lr=3e-4, weight_decay=0.1)
    """

    rule_type = rules.Adam

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        centralization: float = 0.0,
        *,
        weight_decay_mode: str = "plain",
        master_weight_bits: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            rules.Adam(decoupled=True, corrected_decay=_corrected(weight_decay_mode), names=NAMES),
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            centralization=centralization,
            master_weight_bits=master_weight_bits,
            **options,
        )


class Adam(_PureBF16):
    """Adam (Kingma & Ba, arXiv:1412.6980) with bfloat16 state: 4 bytes a parameter.

    Other arguments are those of ``AdamW``, except ``weight_decay_mode``.

    Args:
        weight_decay: added to the gradient times the parameter (coupled), at least 0.

    Examples:
        >>> optimizer = Adam(model.to(torch.bfloat16).parameters(), lr=3e-4)
    """

    rule_type = rules.Adam

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        centralization: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            rules.Adam(names=NAMES),
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            centralization=centralization,
            **options,
        )


class Compass(_PureBF16):
    """Compass with bfloat16 state: 4 bytes a parameter.

    The gradient plus ``amp_fac`` times its running mean, over the root of that sum's second
    moment; see ``optstate_codecs.rules.Compass``. The first steps are ``lr / (1 - beta1)`` long,
    a hundred times ``lr`` by default, so warm the rate up. Other arguments are those of
    ``AdamW``.

    Args:
        betas: decay rates of the mean and of the second moment, each in [0, 1).
        amp_fac: how much of the mean is added to the gradient, at least 0.
        **options: ``maximize``, ``rounding_seed``, ``backend``, ``skip_nonfinite``,
            ``max_grad_norm`` (see ``CodedOptimizer``), and the flags ``foreach``, ``fused``,
            ``capturable``, ``differentiable``.

    Examples:
        >>> optimizer = Compass(model.to(torch.bfloat16).parameters(), lr=3e-4)
    """

    rule_type = rules.Compass

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.99, 0.999),
        amp_fac: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        centralization: float = 0.0,
        *,
        weight_decay_mode: str = "plain",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            rules.Compass(corrected_decay=_corrected(weight_decay_mode)),
            lr=lr,
            betas=betas,
            amp_fac=amp_fac,
            eps=eps,
            weight_decay=weight_decay,
            centralization=centralization,
            **options,
        )


class LPFAdamW(_PureBF16):
    """LPFAdamW with bfloat16 state: 6 bytes a parameter.

    AdamW on the gradient plus ``amp_fac`` times its running mean ``smoothing``; see
    ``optstate_codecs.rules.LPFAdamW``. Other arguments are those of ``Compass``.

    Args:
        betas: decay rates of ``smoothing`` and of the two moments, each in [0, 1).
        amp_fac: how much of ``smoothing`` is added to the gradient, at least 0.

    Examples:
        >>> optimizer = LPFAdamW(model.to(torch.bfloat16).parameters(), lr=3e-4)
    """

    rule_type = rules.LPFAdamW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor, float | Tensor] = (0.9, 0.9, 0.999),
        amp_fac: float = 2.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        centralization: float = 0.0,
        *,
        weight_decay_mode: str = "plain",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            rules.LPFAdamW(corrected_decay=_corrected(weight_decay_mode)),
            lr=lr,
            betas=betas,
            amp_fac=amp_fac,
            eps=eps,
            weight_decay=weight_decay,
            centralization=centralization,
            **options,
        )


class RMSProp(_PureBF16):
    """RMSProp with bias correction and bfloat16 state: 2 bytes a parameter.

    Adam without a first moment; see ``optstate_codecs.rules.RMSProp``. Other arguments are
    those of ``Compass``, except ``betas``, ``amp_fac`` and ``weight_decay_mode``.

    Args:
        beta: decay rate of the second moment, ``ema_squared``, in [0, 1).

    Examples:
        >>> optimizer = RMSProp(model.to(torch.bfloat16).parameters(), lr=3e-4)
    """

    rule_type = rules.RMSProp

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        beta: float | Tensor = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        centralization: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            rules.RMSProp(),
            lr=lr,
            beta=beta,
            eps=eps,
            weight_decay=weight_decay,
            centralization=centralization,
            **options,
        )


class SGD(_PureBF16):
    """SGD with momentum in bfloat16: 2 bytes a parameter, none without momentum.

    Steps are those of ``torch.optim.SGD``, with coupled weight decay. Other arguments are those of
    ``RMSProp``, except ``beta`` and ``eps``.

    Args:
        momentum: factor of the momentum buffer, at least 0; 0 stores none.
        dampening: the gradient enters the buffer times ``1 - dampening``.
        weight_decay: added to the gradient times the parameter (coupled), at least 0.
        nesterov: Nesterov momentum; needs ``momentum`` above 0 and no ``dampening``.

    Examples:
        >>> optimizer = SGD(model.to(torch.bfloat16).parameters(), lr=0.1, momentum=0.9)
    """

    rule_type = rules.SGD

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        centralization: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            rules.SGD(),
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            centralization=centralization,
            **options,
        )


class Lion(_PureBF16):
    """Lion (Chen et al., arXiv:2302.06675) with momentum in bfloat16: 2 bytes a parameter.

    Other arguments are those of ``RMSProp``, except ``beta`` and ``eps``.

    Args:
        betas: weights of the momentum in the step and in its running mean, each in [0, 1).
        weight_decay: the parameter is multiplied by ``1 - lr * weight_decay``; at least 0.

    Examples:
        >>> optimizer = Lion(model.to(torch.bfloat16).parameters(), lr=1e-4, weight_decay=0.1)
    """

    rule_type = rules.Lion

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        centralization: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            rules.Lion(),
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            centralization=centralization,
            **options,
        )


def _corrected(weight_decay_mode: str) -> bool:
    checks.one_of("weight_decay_mode", weight_decay_mode, DECAY_MODES)
    return weight_decay_mode == "bias_corrected"
