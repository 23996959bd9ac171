"""An optimizer's step, row by row, with the host's copies of parameters coming and going."""

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

__all__ = ["in_rows", "step_rows"]

# elements that are stepped in one call: copies of some run while others are stepped, and calls of
# small parameters do not count
CHUNK = 1 << 23


def in_rows(inner: Optimizer) -> bool:
    """Whether stepping a few parameters at a time gives the result of stepping all at once."""
    if isinstance(inner, CodedOptimizer):
        # each by itself, with random numbers that go by its place among all
        return not inner.skip_nonfinite and inner.max_grad_norm is None
    return probe(inner).chunked


def step_rows(inner: Optimizer, copied: Mapping[Tensor, HostCopy]) -> None:
    """Step ``inner`` with the host's copies of some parameters, and send them back.

    Args:
        inner: its groups have the parameters on the device.
        copied: copies that are on their way to the host; with gradients, where they have one.
    """
    apart = in_rows(inner)
    copies: dict[Tensor, HostCopy] = {copy.host: copy for copy in copied.values()}
    with (
        swapped_params(inner, {param: copy.host for param, copy in copied.items()}),
        guarded_inner(inner) as before,
        _without_gradients(inner) as grads,
    ):
        if not isinstance(inner, CodedOptimizer):
            _bring_state(inner, copies)
        every = split_params(inner.param_groups, CHUNK, splittable=False)
        rows = _rows([p for p in every if p.param in grads], copies) if apart else [every]
        for number, row in enumerate(rows):
            if number:
                restore_groups(inner.param_groups, before)
            _step_row(inner, row, copies, grads)


def _bring_state(inner: Optimizer, copies: Mapping[Tensor, HostCopy]) -> None:
    """Have on the host what somebody has put into the state that is elsewhere."""
    known = probe(inner).known
    for param in copies:
        state = inner.state.get(param, {})
        for key, value in state.items():
            moved = isinstance(value, Tensor) and value.dim() and value.device != param.device
            # of what is not the optimizer's, whoever put it there decides
            if moved and (known is None or key in known):
                state[key] = value.to(param.device)


def _rows(ready: list[ParamChunk], copies: Mapping[Tensor, HostCopy]) -> list[list[ParamChunk]]:
    # the device's own first, which the host does not wait for
    here = [piece for piece in ready if piece.param not in copies]
    rows = make_batches([piece for piece in ready if piece.param in copies], CHUNK)
    if len(rows) > 1 and sum(piece.stop for piece in rows[-1]) < CHUNK // 8:
        # a few elements alone are stepped no faster
        rows[-2:] = [rows[-2] + rows[-1]]
    # without any gradient, the optimizer may still count the step
    return ([here] if here or not rows else []) + rows


def _step_row(
    inner: Optimizer,
    row: list[ParamChunk],
    copies: Mapping[Tensor, HostCopy],
    grads: Mapping[Tensor, Tensor],
) -> None:
    if not isinstance(inner, CodedOptimizer):
        # nor does it see what has no gradient: the probe tried it so
        for number, group in enumerate(inner.param_groups):
            of = [[piece.param] * piece.times for piece in row if piece.group == number]
            group["params"] = list(chain.from_iterable(of))
    on_host = [copies[piece.param] for piece in row if piece.param in copies]
    for copy in on_host:
        copy.wait()
    for piece in row:
        piece.param.grad = grads.get(piece.param)
    with dense_for_fused(inner):
        unhooked_step(inner)(inner)
    for piece in row:
        piece.param.grad = None
    for copy in on_host:
        copy.give()


@contextmanager
def _without_gradients(inner: Optimizer) -> Iterator[dict[Tensor, Tensor]]:
    """Inside, no parameter has a gradient; yields those that they had and have afterwards."""
    params = [param for group in inner.param_groups for param in group["params"]]
    grads = {param: param.grad for param in params if param.grad is not None}
    for param in grads:
        param.grad = None
    try:
        yield grads
    finally:
        for param in params:
            param.grad = grads.get(param)
