"""Lion and SGD with their momentum in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from optstate_codecs import CodedOptimizer, Dynamic8, Format
from optstate_codecs.rules import SGD, Lion
from optstate_codecs.writes import write_named

__all__ = ["SGD8", "Lion8", "Lion8bit", "SGD8bit"]


class _Momentum8(CodedOptimizer):
    """A signed moment stored by value: without a second moment there are no update units."""

    storage_options = ("block_size",)

    def __init__(
        self,
        params: Iterable[Any],
        *,
        block_size: int = 2048,
        bf16_stochastic_round: bool = False,
        master_weight_bits: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            self.rule_type(),
            block_size=block_size,
            write=write_named(bf16_stochastic_round, master_weight_bits),
            **options,
        )

    def group_formats(self, group: Mapping[str, Any]) -> dict[str, Format]:
        stored = Dynamic8(group["block_size"], rounding="stochastic")
        return {moment.name: stored for moment in self.rule.moments(self.rule.hyper(group))}


class Lion8bit(_Momentum8):
    """Lion with 8 bits of momentum (8 + 32 / block_size bits per parameter).

    Lion is by Chen et al., arXiv:2302.06675; weight decay is decoupled. The momentum is stored in
    the dynamic exponent map of Dettmers et al., arXiv:2110.02861, rounded stochastically.
    Other arguments are those of ``Adam8bit``, except ``eps``, ``amsgrad`` and ``formats``.

    Args:
        betas: weights of the momentum in the step and in its running mean, each in [0, 1).
        weight_decay: the parameter is multiplied by ``1 - lr * weight_decay`` before the step; at
            least 0.

    Examples:
        >>> optimizer = Lion8bit(model.parameters(), lr=1e-4, weight_decay=0.1)
    """

    rule_type = Lion

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, **options)


class SGD8bit(_Momentum8):
    """SGD with 8 bits of momentum (8 + 32 / block_size bits per parameter; 0 without momentum).

    Steps are those of ``torch.optim.SGD``, with coupled weight decay. The momentum is stored as in
    ``Lion8bit``. Other arguments are those of ``Lion8bit``, except ``betas``.

    Args:
        momentum: factor of the momentum buffer, at least 0; 0 stores none.
        dampening: the gradient enters the buffer times ``1 - dampening``.
        weight_decay: added to the gradient times the parameter (coupled), at least 0.
        nesterov: Nesterov momentum; needs ``momentum`` above 0 and no ``dampening``.

    Examples:
        >>> optimizer = SGD8bit(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    """

    rule_type = SGD

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            **options,
        )


class Lion8(Lion8bit):
    """``Lion8bit`` under a name that other libraries do not take for bitsandbytes', see ``AdamW8``.

    Examples:
        >>> optimizer = Lion8(model.parameters(), lr=1e-4, weight_decay=0.1)
    """


class SGD8(SGD8bit):
    """``SGD8bit`` under a name that other libraries do not take for bitsandbytes', see ``AdamW8``.

    Examples:
        >>> optimizer = SGD8(model.parameters(), lr=0.1, momentum=0.9)
    """
