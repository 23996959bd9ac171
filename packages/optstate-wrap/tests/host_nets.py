"""A small net twice, with torch's optimizer and with one that steps on the host."""

import torch

from optstate_wrap import CPUOffloadOptimizer

ADAMW = {"lr": 1e-2, "fused": True}
SMALL = 100


class Pretends(CPUOffloadOptimizer):
    """Takes the CPU for a device, so that large parameters are copied, and copies stepped."""

    def _remote(self, param) -> bool:
        return True


def plain(groups):
    return torch.optim.AdamW(groups, **ADAMW)


def pretends(groups, optimizer_class=torch.optim.AdamW, **options):
    return Pretends(groups, optimizer_class, **{"lr": 1e-2, "minimal_size": SMALL, **options})


class Net(torch.nn.Sequential):
    """Two large weights, and two small biases."""

    def __init__(self, dtype=torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 7))
        self.to(dtype)

    def loss(self, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch)
        data = torch.randn(8, 20, generator=generator).to(self[0].weight.dtype)
        return self(data).float().square().mean()


def pair(dtype=torch.float32, **options):
    """The same net twice, with torch's optimizer and with ours."""
    nets = Net(dtype), Net(dtype)
    return nets, (plain(nets[0].parameters()), pretends(nets[1].parameters(), **options))


def equal(left, right) -> bool:
    return all(map(torch.equal, left.parameters(), right.parameters()))


def equal_states(left, right) -> bool:
    left, right = left.state_dict()["state"], right.state_dict()["state"]
    return left.keys() == right.keys() and all(
        torch.equal(value, right[number][key])
        for number, state in left.items()
        for key, value in state.items()
    )
