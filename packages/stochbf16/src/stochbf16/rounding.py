"""Stochastic rounding of one tensor to bfloat16, seeded by torch's random number generators."""

from __future__ import annotations

import torch
from torch import Tensor

from optstate_codecs.custom_op import define
from optstate_codecs.engine.capture import capturing
from optstate_codecs.param_checks import check_kind
from optstate_codecs.stochastic import SOURCES, round_

__all__ = ["stochastic_round", "stochastic_round_"]

# advice in the errors for DTensors
LOCAL = "round its .to_local()"


def stochastic_round_(
    target: Tensor, source: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Store ``source`` in the bfloat16 ``target``, rounded up or down so that the mean is exact.

    Values that bfloat16 represents, NaN and infinities are unchanged. A finite value becomes
    infinite only where rounding to nearest makes it infinite too. No gradient flows through the
    operation. One integer drawn from ``generator`` is the seed of every element's random bits:
    after ``torch.manual_seed`` they are the same again, on every device.

    Args:
        target: bfloat16, any layout.
        source: float32, float16 or bfloat16 of the same shape, on the same device.
        generator: source of the seed; None: torch's default CPU generator. A generator of a GPU
            makes the host wait for the GPU.

    Returns:
        ``target``.

    Raises:
        RuntimeError: a CUDA graph is being captured; replays would repeat the random bits.

    Examples:
        >>> weight = torch.ones(3, dtype=torch.bfloat16)
        >>> weight = stochastic_round_(weight, weight.float() - 1e-3)  # 0.99609375 or 1.0
    """
    if torch.compiler.is_compiling():
        # no_grad would stay on after an error in a compiled graph, so gradients are cut here
        torch.ops.optstate.stochastic_round_(target.detach(), source.detach(), generator)
    else:
        _round(target, source, generator)
    return target


def _round(target: Tensor, source: Tensor, generator: torch.Generator | None) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target: must be a tensor, got {type(target).__name__}")
    check_kind("target", target, LOCAL)
    _check(source)
    if target.dtype != torch.bfloat16:
        raise TypeError(f"target: must be torch.bfloat16, got {target.dtype}")
    if target.shape != source.shape:
        shapes = f"target {tuple(target.shape)}, source {tuple(source.shape)}"
        raise ValueError(f"source: must have the shape of target, got {shapes}")
    if target.device != source.device:
        devices = f"target {target.device}, source {source.device}"
        raise ValueError(f"source: must be on the device of target, got {devices}")
    round_([target], [source], _seed(generator), [0], [0])


def stochastic_round(source: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Round ``source`` to a new bfloat16 tensor.

    Arguments are those of ``stochastic_round_``, except ``target``.

    Returns:
        The bfloat16 tensor.

    Examples:
        >>> stochastic_round(torch.full((2,), 0.5)).tolist()
        [0.5, 0.5]
    """
    if not torch.compiler.is_compiling():
        _check(source)
    target = torch.empty_like(source, dtype=torch.bfloat16, requires_grad=False)
    return stochastic_round_(target, source, generator=generator)


def _check(source: Tensor) -> None:
    if not isinstance(source, Tensor):
        raise TypeError(f"source: must be a tensor, got {type(source).__name__}")
    check_kind("source", source, LOCAL)
    if source.dtype not in SOURCES or source.layout != torch.strided:
        allowed = ", ".join(map(str, SOURCES))
        raise TypeError(
            f"source: must be a dense tensor of one of {allowed}, "
            f"got {source.dtype}, {source.layout}"
        )


def _seed(generator: torch.Generator | None) -> int:
    if capturing():
        raise RuntimeError(
            "CUDA graph capture: stochastic_round_ would repeat its random bits at every replay; "
            "round outside the graph"
        )
    device = "cpu" if generator is None else generator.device
    bound, dtype = 2**63 - 1, torch.int64
    return int(torch.randint(bound, (), generator=generator, dtype=dtype, device=device))


# the op includes the draw of the seed, since inductor's random numbers differ from torch's
define("stochastic_round_(Tensor(a!) target, Tensor source, Generator? generator) -> ()", _round)
