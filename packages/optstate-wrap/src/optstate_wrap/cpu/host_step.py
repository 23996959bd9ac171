"""An optimizer's step on host copies of parameters, batch by batch, while others are copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs import CodedOptimizer
from optstate_wrap.cpu.host_copy import HostCopy
from optstate_wrap.delegate import unhooked_step
from optstate_wrap.probe import probe
from optstate_wrap.state.param_chunks import ParamChunk, make_batches, split_params
from optstate_wrap.step.dense import dense_for_fused
from optstate_wrap.step.swapped_params import swapped_params
from optstate_wrap.step.transaction import guarded_inner, restore_groups

__all__ = ["can_step_in_batches", "step_in_batches"]

# elements in one batch: small enough to copy some while others are stepped, and large enough that
# the cost of calls does not count
CHUNK = 1 << 23


def can_step_in_batches(inner: Optimizer) -> bool:
    """Whether stepping a few parameters at a time gives the same result as stepping all at once."""
    if isinstance(inner, CodedOptimizer):
        # parameters are independent, and random numbers depend on their index among all
        return not inner.skip_nonfinite and inner.max_grad_norm is None
    return probe(inner).chunked


def step_in_batches(inner: Optimizer, copied: Mapping[Tensor, HostCopy]) -> None:
    """Step ``inner`` on the host copies of some parameters, and copy them back.

    Args:
        inner: an optimizer whose groups have the parameters on the device.
        copied: by parameter, copies that are on their way to the host, with gradients if any.
    """
    batched = can_step_in_batches(inner)
    copies: dict[Tensor, HostCopy] = {copy.host: copy for copy in copied.values()}
    with (
        swapped_params(inner, {param: copy.host for param, copy in copied.items()}),
        guarded_inner(inner) as before,
        _without_gradients(inner) as grads,
    ):
        if not isinstance(inner, CodedOptimizer):
            _move_state(inner, copies)
        every = split_params(inner.param_groups, CHUNK, splittable=False)
        ready = [chunk for chunk in every if chunk.param in grads]
        batches = _make_batches(ready, copies) if batched else [every]
        for number, batch in enumerate(batches):
            if number:
                restore_groups(inner.param_groups, before)
            _step_batch(inner, batch, copies, grads)


def _move_state(inner: Optimizer, copies: Mapping[Tensor, HostCopy]) -> None:
    """Move state tensors to the host that the user has put on a device."""
    known = probe(inner).known
    for param in copies:
        state = inner.state.get(param, {})
        for key, value in state.items():
            moved = isinstance(value, Tensor) and value.dim() and value.device != param.device
            # entries that are not the optimizer's stay where the user has put them
            if moved and (known is None or key in known):
                state[key] = value.to(param.device)


def _make_batches(
    ready: list[ParamChunk], copies: Mapping[Tensor, HostCopy]
) -> list[list[ParamChunk]]:
    # first the parameters that are stepped on the device: the host does not wait for them
    on_device = [chunk for chunk in ready if chunk.param not in copies]
    batches = make_batches([chunk for chunk in ready if chunk.param in copies], CHUNK)
    if len(batches) > 1 and sum(chunk.stop for chunk in batches[-1]) < CHUNK // 8:
        # a batch of few elements is not worth a call
        batches[-2:] = [batches[-2] + batches[-1]]
    # without any gradient, the optimizer may still count the step
    return ([on_device] if on_device or not batches else []) + batches


def _step_batch(
    inner: Optimizer,
    batch: list[ParamChunk],
    copies: Mapping[Tensor, HostCopy],
    grads: Mapping[Tensor, Tensor],
) -> None:
    if not isinstance(inner, CodedOptimizer):
        # parameters without gradients are left out, as in the probe
        for number, group in enumerate(inner.param_groups):
            of = [[chunk.param] * chunk.times for chunk in batch if chunk.group == number]
            group["params"] = list(chain.from_iterable(of))
    on_host = [copies[chunk.param] for chunk in batch if chunk.param in copies]
    for copy in on_host:
        copy.wait()
    for chunk in batch:
        chunk.param.grad = grads.get(chunk.param)
    with dense_for_fused(inner):
        unhooked_step(inner)(inner)
    for chunk in batch:
        chunk.param.grad = None
    for copy in on_host:
        copy.give()


@contextmanager
def _without_gradients(inner: Optimizer) -> Iterator[dict[Tensor, Tensor]]:
    """Remove all gradients in the body; yields them by parameter, and puts them back after it."""
    params = [param for group in inner.param_groups for param in group["params"]]
    grads = {param: param.grad for param in params if param.grad is not None}
    for param in grads:
        param.grad = None
    try:
        yield grads
    finally:
        for param in params:
            param.grad = grads.get(param)
