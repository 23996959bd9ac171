"""Measures the memory of a run: exact bytes of tensors, and the peak of the process or device.

On a GPU, the peak is that of torch's allocator. On a CPU, torch has no such count, so the peak is
the resident memory of the whole process, with Python and torch's libraries. An optimizer makes
little difference to it, so the exact bytes are reported too.
"""

from dataclasses import dataclass

import torch
from torch import nn

from optstate.process import resident_bytes
from optstate.siblings import require


@dataclass(frozen=True)
class Memory:
    """Bytes at the end of a run.

    Attributes:
        parameters: Storage of the parameters.
        gradients: Storage of the gradients.
        state: Storage of every tensor in the optimizer's state, each counted once.
        peak: The highest sample, or None if the system does not report it.
        peak_kind: A description of `peak` for the report.
    """

    parameters: int
    gradients: int
    state: int
    peak: int | None
    peak_kind: str

    @property
    def counted(self) -> int:
        """Parameters, gradients and state together."""
        return self.parameters + self.gradients + self.state


class PeakMeter:
    """Samples memory during a run and keeps the peak; `sample` is cheap enough for every step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._highest: int | None = None
        self.kind = "allocated on the GPU" if device.type == "cuda" else "whole process"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def sample(self) -> None:
        """Takes a sample of the memory in use now."""
        if self._device.type == "cuda":
            now: int | None = torch.cuda.max_memory_allocated(self._device)
        else:
            now = resident_bytes()
        if now is not None:
            self._highest = max(now, self._highest or 0)

    @property
    def highest(self) -> int | None:
        """Bytes, or None if no sample could be taken."""
        return self._highest


def measure(model: nn.Module, optimizer: torch.optim.Optimizer, meter: PeakMeter) -> Memory:
    """Counts the bytes of a model and its optimizer."""
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    return Memory(
        parameters=sum(p.numel() * p.element_size() for p in parameters),
        gradients=sum(g.numel() * g.element_size() for g in gradients),
        state=int(require("optstate_codecs.memory").state_bytes(optimizer)),
        peak=meter.highest,
        peak_kind=meter.kind,
    )
