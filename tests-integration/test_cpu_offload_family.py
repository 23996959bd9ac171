"""The family's optimizers step on the host too, with their own bits: by the engine for CPUs."""

import pytest
import torch
from torch.nn import Parameter

import lowbit_adam
import stochbf16
from optstate_wrap import CPUOffloadOptimizer
from optstate_wrap.cpu import host_step


class Pretends(CPUOffloadOptimizer):
    """Takes the CPU for a device."""

    def _remote(self, param) -> bool:
        return True


def run(
    make, offload, steps=4, dtype=torch.float32, shapes=((90, 70), (5000,), (10,), (64, 3, 50))
):
    """Parameters, optimizer and its packed state after some steps, half of them after a reload."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = make(params)
    state = {}
    for step in range(steps):
        for number, param in enumerate(params):
            missing = step == number == 1
            param.grad = (
                None if missing else torch.randn(shapes[number], generator=generator).to(dtype)
            )
        optimizer.step()
        state = optimizer.state_dict()
        if step == steps // 2:
            optimizer = make(params)
            optimizer.load_state_dict(state)
    values = [value for _, kept in sorted(state["state"].items()) for value in kept.values()]
    return [param.detach() for param in params], values


def clipping(params, **options):
    return lowbit_adam.AdamW8bit(params, max_grad_norm=0.1, **options)


def skipping(params, **options):
    return lowbit_adam.AdamW8bit(params, skip_nonfinite=True, **options)


# their random numbers go by a parameter's place among all; two look at all gradients
OPTIMIZERS = {
    "AdamW8bit": (lowbit_adam.AdamW8bit, torch.float32),
    "AdamW8bit-clipping": (clipping, torch.float32),
    "AdamW8bit-skipping": (skipping, torch.float32),
    "AdamW4bit": (lowbit_adam.AdamW4bit, torch.float32),
    "stochbf16.AdamW": (stochbf16.AdamW, torch.bfloat16),
}


@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
@pytest.mark.parametrize(("cls", "dtype"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_same_bits_as_without(cls, dtype, offload, monkeypatch) -> None:
    monkeypatch.setattr(host_step, "CHUNK", 8000)

    def ours(params):
        return Pretends(params, cls, lr=1e-2, minimal_size=100, offload_gradients=offload)

    theirs = run(lambda params: cls(params, lr=1e-2), offload, dtype=dtype)
    for expected, found in zip(theirs, run(ours, offload, dtype=dtype), strict=True):
        assert len(expected) == len(found) > 0
        assert all(map(torch.equal, expected, found))
