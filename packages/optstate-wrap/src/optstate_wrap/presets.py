"""One-call functions that wrap an optimizer, and the policies that they use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from optstate_codecs import checks
from optstate_codecs.formats import Int4, Minifloat
from optstate_codecs.plain import plain_value
from optstate_wrap.codecs import BF16Codec, Codec, Int8MomentumCodec
from optstate_wrap.policies import AnyCodec, ConfigurablePolicy, Policy, WarmupPolicy
from optstate_wrap.wrapper import OptimizerWrapper

__all__ = [
    "auto_wrap",
    "make_low_memory_policy",
    "wrap",
    "wrap_low_memory_adamw",
    "wrap_max_compression_adamw",
]


def wrap(
    optimizer: Optimizer,
    policy: Policy | None = None,
    chunk_size: int | None = None,
    chunk_size_on_cuda: int | None = None,
    initial_chunk_size: int | None = None,
    pin_memory: bool | None = None,
    profile: bool = False,
    **options: Any,
) -> OptimizerWrapper:
    """Wrap an optimizer. The arguments are those of ``OptimizerWrapper``.

    Examples:
        >>> optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=3e-4))
    """
    sizes = (chunk_size, chunk_size_on_cuda, initial_chunk_size)
    return OptimizerWrapper(optimizer, policy, *sizes, pin_memory, profile, **options)


def auto_wrap(optimizer: Optimizer, **options: Any) -> OptimizerWrapper:
    """Wrap an optimizer with the defaults.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        **options: those of ``wrap``.

    Returns:
        The wrapper.
    """
    return wrap(optimizer, **options)


def variance_codec(mode: AnyCodec) -> Codec:
    """The codec of a second moment.

    Args:
        mode: "fp32"; "fp16": 16 bits as bfloat16, since small second moments underflow in float16;
            "int8": 8 bits of the root, which are never zero; or any codec or format.
    """
    if mode in ("fp32", None):
        return Codec(None)
    if mode == "fp16":
        return BF16Codec()
    if mode == "int8":
        return Codec(Minifloat.second_moment8(256))
    return mode if isinstance(mode, Codec) else Codec(mode)


def make_low_memory_policy(
    warmup_steps: int = 10,
    variance_mode: AnyCodec = "fp16",
    min_int8_elements: int = 4096,
    small_tensor_codec: AnyCodec = None,
    device_resident: bool | None = None,
) -> WarmupPolicy:
    """A policy with int8 first moments and smaller second moments, after some exact steps.

    Args:
        warmup_steps: number of steps with exact state.
        variance_mode: "fp16", "int8", "fp32", or any codec or format, see ``variance_codec``.
        min_int8_elements: smaller tensors have ``small_tensor_codec`` for both moments.
        small_tensor_codec: None is exact.
        device_resident: False stores state in host memory.
    """
    return WarmupPolicy(
        warmup_steps,
        variance_codec=variance_codec(variance_mode),
        min_int8_elements=min_int8_elements,
        small_tensor_codec=small_tensor_codec,
        device_resident=device_resident,
        momentum_codec=Int8MomentumCodec(),
    )


def wrap_low_memory_adamw(
    params: Iterable[Any],
    lr: float = 5e-5,
    weight_decay: float = 0.01,
    warmup_steps: int = 10,
    variance_mode: AnyCodec = "fp16",
    chunk_size: int | None = None,
    initial_chunk_size: int | None = 1,
    pin_memory: bool | None = None,
    min_int8_elements: int = 4096,
    small_tensor_codec: AnyCodec = None,
    device_resident: bool | None = None,
    chunk_size_on_cuda: int | None = None,
    **adamw_kwargs: Any,
) -> OptimizerWrapper:
    """``torch.optim.AdamW`` with int8 first and 16-bit second moments: 24 bits a parameter.

    The codecs' engine steps parameters with coded state, bfloat16 and float16 ones in float32
    arithmetic: ``fused=True`` of ``OptimizerWrapper``.

    Args:
        params: parameters or param groups, as for ``torch.optim.AdamW``.
        lr: learning rate.
        weight_decay: decoupled, at least 0.
        warmup_steps: number of steps with exact state.
        variance_mode: format of second moments, see ``make_low_memory_policy``.
        chunk_size: number of elements decoded at a time, see ``OptimizerWrapper``.
        initial_chunk_size: ``chunk_size`` of the step that creates the state.
        pin_memory: whether host memory for state is page-locked.
        min_int8_elements: smaller tensors have ``small_tensor_codec``.
        small_tensor_codec: None is exact.
        device_resident: False stores state in host memory.
        chunk_size_on_cuda: replaces ``chunk_size`` on a GPU.
        **adamw_kwargs: other arguments of ``torch.optim.AdamW``.

    Examples:
        >>> optimizer = wrap_low_memory_adamw(model.parameters(), lr=2e-5)
    """
    policy = make_low_memory_policy(
        warmup_steps, variance_mode, min_int8_elements, small_tensor_codec, device_resident
    )
    inner = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, **adamw_kwargs)
    sizes = (chunk_size, chunk_size_on_cuda, initial_chunk_size)
    return wrap(inner, policy, *sizes, pin_memory, fused=True)


class MaxCompressionPolicy(ConfigurablePolicy):
    """4 bits for each moment of large tensors; the moments of small ones stay exact."""

    def __init__(self, device_resident: bool | None = None, min_elements: int = 4096) -> None:
        min_elements = checks.whole_number("min_elements", min_elements)
        super().__init__(
            {
                "exp_avg": Int4.first_moment(),
                "exp_avg_sq": Minifloat.second_moment4(),
                "max_exp_avg_sq": Minifloat.second_moment4(),
            }
        )
        self.device_resident = plain_value(device_resident)
        self.min_elements = min_elements

    def get_codecs(self, param: torch.Tensor, state: Any, step: int) -> Any:
        if param.numel() < self.min_elements:
            return {}
        return super().get_codecs(param, state, step)


def wrap_max_compression_adamw(
    params: Iterable[Any],
    lr: float = 5e-5,
    weight_decay: float = 0.01,
    chunk_size: int | None = None,
    chunk_size_on_cuda: int | None = None,
    initial_chunk_size: int | None = 1,
    pin_memory: bool | None = None,
    device_resident: bool | None = None,
    **adamw_kwargs: Any,
) -> OptimizerWrapper:
    """``torch.optim.AdamW`` with 4 bits for each moment: 8.25 bits of state a parameter.

    Parameters with coded state are stepped as in ``wrap_low_memory_adamw``.

    Args:
        params: parameters or param groups, as for ``torch.optim.AdamW``.
        lr: learning rate.
        weight_decay: decoupled, at least 0.
        chunk_size: number of elements decoded at a time, see ``OptimizerWrapper``.
        chunk_size_on_cuda: replaces ``chunk_size`` on a GPU.
        initial_chunk_size: ``chunk_size`` of the step that creates the state.
        pin_memory: whether host memory for state is page-locked.
        device_resident: False stores state in host memory.
        **adamw_kwargs: other arguments of ``torch.optim.AdamW``.

    Examples:
        >>> optimizer = wrap_max_compression_adamw(model.parameters(), lr=2e-5)
    """
    inner = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, **adamw_kwargs)
    policy = MaxCompressionPolicy(device_resident)
    sizes = (chunk_size, chunk_size_on_cuda, initial_chunk_size)
    return wrap(inner, policy, *sizes, pin_memory, fused=True)
