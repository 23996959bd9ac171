"""Writes the checkpoints of other libraries that the tests of ``optstate convert`` read.

    python make_peers.py

Each library's AdamW takes three steps of one linear layer; torch's AdamW steps a copy with the same
gradients, and its state is kept beside the library's as ``exact``. Needs torchao, bitsandbytes,
torchastic and turboadam 0.2; the files here are of torchao 0.18.0, bitsandbytes 0.50.2, torchastic
0.1.2 and turboadam 0.2.0.
"""

import io
import lzma
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SHAPES = ((64, 72), (5,))
KNOWN: dict[str, tuple[str, str, dict[str, Any], torch.dtype]] = {
    "torchao": ("torchao.optim", "AdamW8bit", {}, torch.float32),
    "bitsandbytes": ("bitsandbytes.optim", "AdamW8bit", {}, torch.float32),
    "torchastic": ("torchastic", "AdamW", {}, torch.bfloat16),
    "turboadam": ("turboadam", "TurboAdam", {}, torch.float32),
}


def checkpoint(name: str) -> dict[str, Any]:
    """The library's state after three steps, and torch's."""
    module, cls, arguments, dtype = KNOWN[name]
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    exact = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = getattr(import_module(module), cls)(theirs, lr=1e-3, **arguments)
    reference = torch.optim.AdamW(exact, lr=1e-3)
    for _ in range(3):
        for one, other in zip(theirs, exact, strict=True):
            other.grad = torch.randn(other.shape, generator=generator) * 1e-2
            one.grad = other.grad.to(dtype)
        optimizer.step()
        reference.step()
    return {"epoch": 7, "optimizer": optimizer.state_dict(), "exact": reference.state_dict()}


def main() -> None:
    """Writes the named libraries' files, or all."""
    for name in sys.argv[1:] or KNOWN:
        file = io.BytesIO()
        torch.save(checkpoint(name), file)
        (HERE / f"{name}.pt.xz").write_bytes(lzma.compress(file.getvalue()))


if __name__ == "__main__":
    main()
