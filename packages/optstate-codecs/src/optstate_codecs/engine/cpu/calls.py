"""Calls of compiled kernels: their tables, and all that stays the same between two steps.

Tables are numpy arrays, which take a fraction of the time of tensors to write single numbers to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch

from optstate_codecs.counts import counted, taken
from optstate_codecs.engine.cpu.emit import HEAD
from optstate_codecs.engine.cpu.kernels import CompiledKernel
from optstate_codecs.engine.request import ParamStep, StepRequest
from optstate_codecs.gradients.centralization import mean_layout
from optstate_codecs.rounding import stream_key

__all__ = ["KernelCall", "call_kernel"]

NUMEL, FIRST_BLOCK, DRAW, OFFSET, INNER, ROWS = range(HEAD)


class KernelCall:
    """Steps parameters with one kernel in one call.

    Args:
        request: of the first step.
        kernel: of these parameters.
        positions: of the parameters in the request.
    """

    def __init__(
        self, request: StepRequest, kernel: CompiledKernel, positions: Sequence[int]
    ) -> None:
        self._kernel, self._positions = kernel, positions
        self._param_steps = [request.param_steps[position] for position in positions]
        self._counters = [param_step.state["step"] for param_step in self._param_steps]
        self._groups = [param_step.group for param_step in self._param_steps]
        self._table = numpy.zeros((len(positions), kernel.width), dtype=numpy.int64)
        self._grads: list[int] = []
        self._blocks = 0
        keys = []
        for row, param_step in zip(self._table, self._param_steps, strict=True):
            numel = param_step.param.numel()
            row[NUMEL], row[FIRST_BLOCK], row[OFFSET] = numel, self._blocks, param_step.offset
            row[INNER], row[ROWS] = mean_layout(param_step.param) if kernel.centered else (1, 1)
            row[HEAD] = param_step.param.data_ptr()
            parts = [param_step.state[key].data_ptr() for key in kernel.keys]
            row[kernel.width - len(parts) :] = parts
            keys += _keys(kernel, param_step)
            self._blocks += -(-numel // kernel.block_size)
        self._scalars = numpy.zeros((len(positions), kernel.scalars), dtype=numpy.float32)
        self._keys = numpy.array(keys, dtype=numpy.uint32)
        tables = (self._table, self._scalars, self._keys)
        self._pointers = [table.ctypes.data for table in tables]

    def run(self, request: StepRequest) -> None:
        """Take a step."""
        counts = counted(self._counters, request.draw is not None)
        request.counted += self._param_steps
        self._fill(request, counts)
        self._kernel.run(len(counts), self._blocks, *self._pointers, torch.get_num_threads())
        request.done += self._param_steps

    def _fill(self, request: StepRequest, counts: list[float]) -> None:
        """Write what changes from step to step into the tables."""
        given = request.addresses or [grad.data_ptr() for grad in request.grads]
        addresses = [given[position] for position in self._positions]
        if addresses != self._grads:
            self._table[:, HEAD + 1] = self._grads = addresses
        if self._kernel.centered and (means := request.grad_means) is not None:
            start = means.values[torch.device("cpu")].data_ptr()
            self._table[:, HEAD + 2] = [start + 4 * means.starts[p] for p in self._positions]
        factor = 1.0 if request.factor is None else float(request.factor)
        steps = list(zip(self._groups, counts, strict=True))
        rows = {
            key: [*request.rule.scalars(request.hypers[key[0]], key[1]), factor]
            for key in dict.fromkeys(steps)
        }
        draws = {count: taken(count) for count in dict.fromkeys(counts)}
        if len(rows) == 1:
            self._scalars[:] = rows[steps[0]]
            self._table[:, DRAW] = draws[counts[0]] if request.draw is None else request.draw
            return
        self._scalars[:] = [rows[key] for key in steps]
        drawn = [draws[count] for count in counts] if request.draw is None else request.draw
        self._table[:, DRAW] = drawn


def _keys(kernel: CompiledKernel, param_step: ParamStep) -> list[int]:
    seed, key = param_step.seed, param_step.key
    return [k for s in kernel.streams for k in stream_key(seed, key, s // 2)]


def call_kernel(
    kernel: CompiledKernel,
    numels: Sequence[int],
    draws: Sequence[int],
    addresses: Sequence[Sequence[int]],
    scalars: Sequence[float],
    keys: Sequence[Sequence[int]],
    threads: int,
) -> None:
    """Step tensors that have the same scalars.

    Args:
        kernel: takes the step.
        numels: elements.
        draws: key the random numbers.
        addresses: of the kernel's inputs; where there are means, of one for the whole tensor.
        scalars: the rule's, and the factor of gradients.
        keys: of random numbers.
        threads: to run in.
    """
    table = numpy.zeros((len(numels), kernel.width), dtype=numpy.int64)
    blocks = [-(-numel // kernel.block_size) for numel in numels]
    table[:, NUMEL], table[:, DRAW] = numels, draws
    table[1:, FIRST_BLOCK] = numpy.cumsum(blocks)[:-1]
    table[:, INNER], table[:, ROWS] = numpy.maximum(numels, 1), 1
    table[:, HEAD:] = addresses
    rows = numpy.array([scalars] * len(numels), dtype=numpy.float32)
    words = numpy.array(keys, dtype=numpy.uint32)
    pointers = [table.ctypes.data, rows.ctypes.data, words.ctypes.data]
    kernel.run(len(numels), sum(blocks), *pointers, threads)
