"""Target: the header of a safetensors file, its metadata and its tensors."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from pathlib import Path
from weakref import finalize

import contract
import torch
from edits import Choices, edited
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer, load_safetensors, save_safetensors

SHAPES = ((4, 30), (7,), (), (3, 64))
FORMATS = {"exp_avg": "costate(bits=3)", "exp_avg_sq": "oneq(bits=3)", "max_exp_avg_sq": "fp32"}


def made() -> tuple[list[Parameter], CodedOptimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]
    return params, CodedOptimizer(groups, Adam(), FORMATS, lr=0.02, backend="eager")


class Target:
    """``one`` loads a file whose header the bytes decide."""

    name = "header"

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-header-"))
        finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.path = self.folder / "file"
        params, optimizer = made()
        for seed in range(2):
            contract.gradients(params, seed)
            optimizer.step()
        save_safetensors(optimizer, self.path)
        self.raw = self.path.read_bytes()
        (length,) = struct.unpack("<Q", self.raw[:8])
        self.outer = json.loads(self.raw[8 : 8 + length])
        self.inner = json.loads(self.outer["__metadata__"]["optstate"])
        self.data = self.raw[8 + length :]
        self.refused = self.loaded = 0
        self.ready: tuple[list[Parameter], CodedOptimizer] | None = None

    def seeds(self) -> list[bytes]:
        """Inputs to begin with: the file itself, and single edits of both headers."""
        edits = [
            bytes([mode, 0, at, kind, at])
            for mode in (1, 2, 3)
            for at in range(0, 250, 11)
            for kind in range(6)
        ]
        return [b"\x00" + self.raw, b"\x00" + self.raw[:300], *edits]

    def one(self, data: bytes) -> None:
        """Load the file that ``data`` stands for.

        Raises:
            contract.Violation: the contract is broken.
        """
        choices = Choices(data)
        mode = choices.below(4)
        try:
            content = choices.rest if mode == 0 else self._file(mode, choices)
        except (ValueError, UnicodeError):
            return
        self.path.write_bytes(content)
        params, optimizer = self.ready or self._trained()
        if contract.refused(lambda: load_safetensors(optimizer, self.path), optimizer, self.folder):
            self.refused += 1
            # not changed, so that the next input may use it
            self.ready = params, optimizer
        else:
            contract.steps(params, optimizer)
            self.loaded += 1
            self.ready = None

    @staticmethod
    def _trained() -> tuple[list[Parameter], CodedOptimizer]:
        params, optimizer = made()
        contract.gradients(params, 1)
        optimizer.step()
        return params, optimizer

    def _file(self, mode: int, choices: Choices) -> bytes:
        outer, inner, data = dict(self.outer), self.inner, self.data
        if mode == 3:
            start = choices.below(len(data))
            new = choices.rest[:16]
            data = data[:start] + new + data[start + len(new) :]
        if mode == 1:
            inner, _ = edited(inner, choices)
        outer["__metadata__"] = {**outer["__metadata__"], "optstate": json.dumps(inner)}
        if mode == 2:
            outer, _ = edited(outer, choices)
        text = json.dumps(outer).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data
