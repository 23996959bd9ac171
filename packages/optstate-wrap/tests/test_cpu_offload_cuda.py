"""The step on the host, for parameters on a GPU: same bits, no waiting, no memory."""

import copy

import pytest
import torch
from host_nets import equal, equal_states, plain
from torch.nn import Parameter

from optstate_wrap import CPUOffloadOptimizer

pytestmark = pytest.mark.cuda


def on_gpu(**options):
    """A net on the GPU, six weights of 4 MiB and six small biases, and its optimizer."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(6)]).cuda()
    return net, CPUOffloadOptimizer(net.parameters(), lr=1e-3, **options)


def train(net, optimizer, steps=4, passes=2):
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(steps):
        for _ in range(passes):
            x = torch.randn(64, 1024, device="cuda", generator=generator)
            net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_on_a_gpu_offloaded_gradients_have_the_same_bits() -> None:
    runs = on_gpu(), on_gpu(offload_gradients=True)
    for net, optimizer in runs:
        train(net, optimizer)
    assert equal(runs[0][0], runs[1][0])
    assert equal_states(runs[0][1], runs[1][1])
    for copies in (optimizer._copies.made.values() for _, optimizer in runs):
        assert all(copy.host.is_pinned() and copy._buffer.is_pinned() for copy in copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_the_host_steps(offload, dtype) -> None:
    twins = [Parameter(torch.randn(700, 130).to(dtype)) for _ in range(5)]
    ours = [Parameter(twin.detach().cuda()) for twin in twins]
    theirs = plain(twins)
    optimizer = CPUOffloadOptimizer(ours, lr=1e-2, offload_gradients=offload)
    for step in range(4):
        for number, (param, twin) in enumerate(zip(ours, twins, strict=True)):
            twin.grad = None if number == step else torch.randn_like(twin)
            param.grad = None if twin.grad is None else twin.grad.cuda()
        theirs.step()
        optimizer.step()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, twins, strict=True))
    states = [state for param in ours for state in optimizer.state[param].values()]
    assert {value.device.type for value in states} == {"cpu"}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_a_gpu_a_step_waits_for_its_copies_only(offload) -> None:
    net, optimizer = on_gpu(offload_gradients=offload)
    train(net, optimizer)
    net(torch.randn(64, 1024, device="cuda")).square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_a_gpu_offloaded_gradients_take_no_memory(monkeypatch) -> None:
    monkeypatch.setattr("optstate_wrap.cpu.host_copy.WAITING", 1 << 22)
    net, optimizer = on_gpu(offload_gradients=True)
    train(net, optimizer, passes=1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    train(net, optimizer, passes=1)
    # of six gradients of 4 MiB: one that is made, one or two on their way, and activations
    assert torch.cuda.max_memory_allocated() - held < 18 << 20


def test_on_a_gpu_loading_needs_no_room(offload) -> None:
    net, optimizer = on_gpu(offload_gradients=offload)
    train(net, optimizer)
    state = optimizer.state_dict()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    optimizer.load_state_dict(state)
    assert torch.cuda.max_memory_allocated() - held < 1 << 20
    theirs = torch.optim.AdamW(net.parameters(), lr=1e-3)
    theirs.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(theirs.state_dict())
    assert equal_states(copy.deepcopy(optimizer), optimizer)
    train(net, optimizer)
    assert optimizer.state[net[0].weight]["exp_avg"].device.type == "cpu"


def test_on_a_gpu_state_may_be_written() -> None:
    """What is put there beside the parameter goes to the host; foreign entries stay."""
    twin = Parameter(torch.randn(700, 130))
    ours = Parameter(twin.detach().cuda())
    sides = (twin, plain([twin])), (ours, CPUOffloadOptimizer([ours], lr=1e-2))
    for step in range(4):
        for param, optimizer in sides:
            if step == 2:
                optimizer.state[param]["exp_avg"] = torch.zeros_like(param)
                optimizer.state[param]["slow"] = torch.ones_like(param)
            param.grad = torch.full_like(param, 0.5 + step)
            optimizer.step()
    assert torch.equal(ours.cpu(), twin)
    state = sides[1][1].state[ours]
    assert state["exp_avg"].device.type == "cpu"
    assert state["slow"].is_cuda
