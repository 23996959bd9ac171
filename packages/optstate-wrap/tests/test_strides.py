"""Parameters and gradients of any strides are stepped as torch steps them, and nothing beside."""

from collections.abc import Callable

import pytest
import torch
from host_nets import pretends
from torch import Tensor
from torch.nn import Parameter

from optstate_wrap import ConfigurablePolicy, CPUOffloadOptimizer, wrap

SHAPE = (4, 6, 5, 8)
STEPS = 3
GUARD = 7.0


def dense(x: Tensor) -> Tensor:
    return x


def gaps(x: Tensor) -> Tensor:
    """Every other element of a larger tensor, whose others are to stay ``GUARD``."""
    room = torch.full((*x.shape, 2), GUARD, device=x.device)
    room[..., 0] = x
    return room[..., 0]


def columns(x: Tensor) -> Tensor:
    """The left half of a wider tensor."""
    return torch.cat([x, torch.full_like(x, GUARD)], -1)[..., : x.shape[-1]]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 2).contiguous().transpose(0, 2)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def expanded(x: Tensor) -> Tensor:
    return x[:1, :1].expand_as(x)


PARAMS = (dense, gaps, columns, transposed, channels_last)
GRADS = (dense, gaps, transposed, channels_last, expanded)
FUSED = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
CODED = ConfigurablePolicy({"exp_avg_sq": "bf16(rounding=nearest)"}, warmup_steps=STEPS)
OURS: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
    "CPUOffloadOptimizer": lambda p: CPUOffloadOptimizer(p, lr=1e-2, weight_decay=0.1),
    "on the host": lambda p: pretends(p, weight_decay=0.1),
    "gradients too": lambda p: pretends(p, weight_decay=0.1, offload_gradients=True),
    "wrapped": lambda p: wrap(torch.optim.AdamW(p, **FUSED), ConfigurablePolicy({}), 256),
    "wrapped, in the host's memory": lambda p: wrap(
        torch.optim.AdamW(p, **FUSED), ConfigurablePolicy({}), 4096, store="host"
    ),
    "wrapped, coded": lambda p: wrap(torch.optim.AdamW(p, **FUSED), CODED, fused=False),
}


def outside(param: Tensor) -> Tensor:
    """The memory of a parameter's storage that is no element of it."""
    room = torch.empty(0, device=param.device).set_(param.untyped_storage()).clone()
    torch.as_strided(room, param.shape, param.stride(), param.storage_offset()).fill_(GUARD)
    return room


def stepped(make, param: Callable, grad: Callable, steps: int = STEPS, device="cpu") -> Parameter:
    generator = torch.Generator().manual_seed(0)
    left = Parameter(param(torch.randn(SHAPE, generator=generator).to(device)))
    optimizer = make([left])
    for _ in range(steps):
        slope = grad(torch.randn(SHAPE, generator=generator).to(device))
        left.grad = slope
        before = slope.clone()
        optimizer.step()
        # an offloaded gradient is used up
        assert left.grad is (None if getattr(optimizer, "offload_gradients", False) else slope)
        assert torch.equal(slope, before)
    return left


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("grad", GRADS)
def test_any_strides(make, param, grad) -> None:
    expected = stepped(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), param, grad)
    got = stepped(make, param, grad)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert got.stride() == expected.stride()
    assert (outside(got) == GUARD).all()


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad])
def test_other_fused_steps(cls) -> None:
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    for make in (
        lambda p: CPUOffloadOptimizer(p, cls, lr=1e-2, fused=True, **options),
        lambda p: wrap(cls(p, lr=1e-2, fused=True, **options), ConfigurablePolicy({}), 256),
    ):
        # torch's fused SGD reads its first momentum before it has written it
        steps = 1 if cls is torch.optim.SGD else STEPS
        expected = stepped(lambda p: cls(p, lr=1e-2, **options), columns, transposed, steps)
        got = stepped(make, columns, transposed, steps)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        assert (outside(got) == GUARD).all()


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
def test_state_of_other_strides_is_loaded(make) -> None:
    """A checkpoint of a contiguous parameter goes on in one that is not."""
    ends = []
    for maker in (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), make):
        generator = torch.Generator().manual_seed(0)
        start, *slopes = torch.randn((3, *SHAPE), generator=generator)
        plain = Parameter(start.clone())
        first = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.1)
        plain.grad = slopes[0].clone()
        first.step()
        param = Parameter(channels_last(plain.detach()))
        optimizer = maker([param])
        fused = [group.get("fused") for group in optimizer.param_groups]
        optimizer.load_state_dict(first.state_dict())
        for group, value in zip(optimizer.param_groups, fused, strict=True):
            group["fused"] = value
        param.grad = slopes[1].clone()
        optimizer.step()
        ends.append(param)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.cuda
@pytest.mark.parametrize("make", [*OURS.values()], ids=[*OURS])
@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("grad", GRADS)
def test_on_a_gpu(make, param, grad) -> None:
    """Small ones are stepped there, by torch's fused kernel, which would raise."""
    torch_s = lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False)  # noqa: E731
    expected = stepped(torch_s, param, grad, device="cuda")
    got = stepped(make, param, grad, device="cuda")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert got.stride() == expected.stride()
    assert (outside(got) == GUARD).all()
