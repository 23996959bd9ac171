"""Target: the manifest of a state file, and the file itself, resumed from."""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from pathlib import Path
from weakref import finalize

import contract
import torch
from edits import Choices, edited
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer, offload

SHAPES = ((4, 30), (7,), (), (0, 3), (96, 96))
# small, so that the last parameter is stepped in parts
CHUNK_BYTES = 1 << 14
FORMATS = {
    "exp_avg": "dynamic8(units=update)",
    "exp_avg_sq": "dynamic8(signed=False, rounding=stochastic)",
    "max_exp_avg_sq": "fp32",
}


def make(params: list[Parameter]) -> CodedOptimizer:
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.01}]
    return CodedOptimizer(groups, Adam(), FORMATS, lr=0.02, backend="eager")


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


class Target:
    """``one`` resumes from a file whose manifest the bytes decide."""

    name = "manifest"

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-manifest-"))
        finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        original = self.folder / "original"
        original.mkdir()
        self.work = self.folder / "work"
        params = parameters()
        optimizer = offload(make(params), "disk", path=original / "f", chunk_bytes=CHUNK_BYTES)
        for seed in range(2):
            contract.gradients(params, seed)
            optimizer.step()
        del optimizer
        gc.collect()
        self.manifest = json.loads((original / "f.json").read_text())
        self.state = (original / "f").read_bytes()
        self.refused = self.loaded = 0
        self.ready: tuple[list[Parameter], CodedOptimizer] | None = None
        # elsewhere, so that a write out of the folder is seen
        (self.folder / "outside").mkdir()
        (self.folder / "outside" / "f").write_bytes(self.state)
        self.outside = contract.files(self.folder / "outside")

    def seeds(self) -> list[bytes]:
        """Inputs to begin with: the manifest itself, and single edits of it."""
        text = json.dumps(self.manifest).encode()
        edits = [bytes([1, 0, at, kind, at]) for at in range(0, 250, 7) for kind in range(6)]
        return [b"\x00" + text, b"\x00" + text[: len(text) // 2], *edits]

    def one(self, data: bytes) -> None:
        """Resume from the manifest that ``data`` stands for.

        Raises:
            contract.Violation: the contract is broken.
        """
        choices = Choices(data)
        state = self.state
        if choices.below(4) == 0:
            text = choices.rest
        else:
            content, _ = edited(self.manifest, choices)
            try:
                text = json.dumps(content).encode()
            except ValueError:
                return
            if choices.below(8) == 1:
                state = state[: len(state) * choices.below(256) // 255]
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        (self.work / "f").write_bytes(state)
        (self.work / "f.json").write_bytes(text)
        params, optimizer = self.ready or self._trained()
        if contract.refused(
            lambda: offload(optimizer, "disk", path=self.work / "f", resume=True),
            optimizer,
            self.work,
        ):
            self.refused += 1
            # not changed, so that the next input may use it
            self.ready = params, optimizer
        else:
            contract.steps(params, optimizer)
            self.loaded += 1
            self.ready = None
            del optimizer
        if contract.files(self.folder / "outside") != self.outside:
            raise contract.Violation("a file outside of the folder has changed")
        names = {path.name for path in self.work.iterdir()}
        if names - {"f", "f.json", "f.json.new"}:
            raise contract.Violation(f"unexpected files {names}")

    @staticmethod
    def _trained() -> tuple[list[Parameter], CodedOptimizer]:
        params = parameters()
        optimizer = make(params)
        contract.gradients(params, 1)
        optimizer.step()
        return params, optimizer
