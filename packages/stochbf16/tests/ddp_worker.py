"""One of the processes of ``test_accumulator_ddp.py``: rank, folder, backend.

It writes what it found into the folder. With nccl each has a GPU of its own.

A parameter's gradient is the input that it is multiplied with, so what should come out is known in
float64.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stochbf16 import StochasticAccumulator, pending

SIZES = (1000, 37, 3)
BATCHES = 32
WORLD = 2


class Products(nn.Module):
    """Three vectors times three inputs, and one that nothing is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.ParameterList(torch.zeros(n, dtype=torch.bfloat16) for n in SIZES)
        self.unused = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        products = zip(self.vectors, inputs, strict=True)
        return torch.stack([(p * x).sum().float() for p, x in products]).sum()


def inputs(rank: int, round_: int, batch: int) -> list[Tensor]:
    """First about 64, then about 0.2, which rounding to nearest would lose in that."""
    generator = torch.Generator().manual_seed(rank + WORLD * (batch + BATCHES * round_))
    mean = 0.2 if batch else 64.0
    return [mean * (1 + 0.02 * torch.randn(n, generator=generator)).bfloat16() for n in SIZES]


def accumulate(model: DistributedDataParallel, rank: int, round_: int, sync: str) -> None:
    for batch in range(BATCHES):
        last = batch == BATCHES - 1
        with model.no_sync() if sync == "last" and not last else nullcontext():
            device = next(model.parameters()).device
            model([x.to(device) for x in inputs(rank, round_, batch)]).backward()


def run(
    rank: int, device: str, view: bool, sync: str, to_none: bool, stochastic: bool
) -> dict[str, Any]:
    model = DistributedDataParallel(
        Products().to(device), gradient_as_bucket_view=view, find_unused_parameters=True
    )
    # between reductions workers draw each for themselves; a reduction rounds to nearest, and loses
    # the less the more the workers' sums agree
    accumulator = StochasticAccumulator(model, rounding_seed=rank if sync == "last" else 0)
    if stochastic:
        accumulator.attach()
    found, launches = [], []
    for round_ in range(2):
        model.zero_grad(set_to_none=to_none)
        with mock.patch.object(pending, "round_", wraps=pending.round_) as launched:
            accumulate(model, rank, round_, sync)
        launches.append(launched.call_count)
        for place, param in enumerate(model.module.vectors):
            every = [
                inputs(r, round_, b)[place].double() for r in range(WORLD) for b in range(BATCHES)
            ]
            exact = torch.stack(every).sum(0) / WORLD
            assert param.grad is not None
            off = (param.grad.cpu().double() - exact) / exact
            found.append({"bias": float(off.mean()), "most": float(off.abs().max())})
        grads = [p.grad for p in model.parameters() if p.grad is not None]
    accumulator.detach()
    together = torch.cat([g.float() for g in grads])
    other = together.clone()
    dist.broadcast(other, 0)
    return {"found": found, "launches": launches, "same": torch.equal(together, other)}


def main() -> None:
    rank, folder, backend = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    device = "cpu"
    if backend == "nccl":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD
    )
    results = {
        f"{view} {sync} {to_none} {stochastic}": run(rank, device, view, sync, to_none, stochastic)
        for view in (False, True)
        for sync in ("every", "last")
        for to_none in (False, True)
        for stochastic in (True, False)
    }
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
