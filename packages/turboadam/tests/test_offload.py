"""TurboAdam with its state elsewhere steps as it does with the state beside the parameters."""

import copy

import pytest
import torch
from torch.nn import Parameter

from optstate_codecs.offloading import offload
from turboadam import TurboAdam


@pytest.mark.parametrize("store", ["host", "disk"])
def test_offloaded(store, tmp_path):
    generator = torch.Generator().manual_seed(0)
    ours = [Parameter(torch.randn(s, generator=generator)) for s in ((130, 300), (64,), (5000,))]
    theirs = copy.deepcopy(ours)
    path = tmp_path / "state" if store == "disk" else None
    plain = TurboAdam(ours, lr=0.01)
    away = offload(TurboAdam(theirs, lr=0.01), store, path=path, chunk_bytes=9000)
    for _ in range(5):
        for first, second in zip(ours, theirs, strict=True):
            first.grad = torch.randn(first.shape, generator=generator)
            second.grad = first.grad.clone()
        plain.step()
        away.step()
    assert len(away.executor.placement.chunks) > 2
    for first, second in zip(ours, theirs, strict=True):
        assert torch.equal(first, second)
        for key, value in plain.state[first].items():
            assert torch.equal(value, away.state[second][key]), key
