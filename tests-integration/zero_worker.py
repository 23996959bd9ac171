"""One of the two processes of ``test_zero.py``: rank, folder. It writes what it found there."""

import json
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optstate_codecs import Adam, CodedOptimizer

FORMATS = {"exp_avg": "int8(rounding=stochastic, units=update)", "exp_avg_sq": "oneq(bits=8)"}
NUMEL = 256


def make(params: object, **options: object) -> CodedOptimizer:
    return CodedOptimizer(params, Adam(), FORMATS, "stochastic", lr=1e-2, **options)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(NUMEL, dtype=torch.bfloat16))


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 3) -> None:
    for _ in range(steps):
        for param in params:
            param.grad = torch.linspace(-1, 1, NUMEL).bfloat16()
        optimizer.step()


def copies(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def alone(key: object) -> Tensor:
    param = parameter()
    optimizer = make([param]) if key is None else make([param], rounding_key=key)
    train(optimizer, [param])
    return param.detach()


def found(rank: int, keyed: bool) -> dict[str, bool]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {"rounding_key": rank} if keyed else {}
    params = [parameter(), parameter()]
    optimizer = ZeroRedundancyOptimizer(params, make, **options)
    train(optimizer, params)
    results = {
        "differ": not torch.equal(*params),
        "as alone": all(
            torch.equal(param, alone(key if keyed else None)) for key, param in enumerate(params)
        ),
    }
    optimizer.consolidate_state_dict(to=0)
    # a copy, since the load does not copy what is on its device
    saved = [deepcopy(optimizer.state_dict()) if rank == 0 else None]
    dist.broadcast_object_list(saved, src=0)

    other = [nn.Parameter(value) for value in copies(params)]
    resumed = ZeroRedundancyOptimizer(other, make, **options)
    resumed.load_state_dict(saved[0])
    if keyed:
        resumed.param_groups[0]["rounding_key"] = rank
    train(optimizer, params)
    train(resumed, other)
    results["resumed"] = all(map(torch.equal, params, other))
    return results


def named() -> bool:
    """Groups with names, of which each worker has some parameters but all names."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = [parameter(), parameter()]
    groups = [
        {"params": [param], "param_names": [name]} for name, param in zip("ab", params, strict=True)
    ]
    optimizer = ZeroRedundancyOptimizer(groups, make)
    train(optimizer, params)
    return not torch.equal(*params)


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    # of torch.jit, which torch.distributed.optim still imports
    warnings.simplefilter("ignore")
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = {"plain": found(rank, False), "keyed": found(rank, True), "named": named()}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
