"""A parameter that a group has twice, of which torch warns, is stepped as torch steps it."""

import copy

import pytest
import torch
from host_nets import pretends
from torch.nn import Parameter

from optstate_codecs import GradientRelease
from optstate_wrap import ConfigurablePolicy, CPUOffloadOptimizer, wrap

pytestmark = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with dup")

INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}
CODED = {"exp_avg": "int8", "exp_avg_sq": "oneq(bits=8)", "momentum_buffer": "int8"}


@pytest.fixture(params=INNER)
def inner(request):
    return INNER[request.param]


def groups(seed: int = 0):
    """Two groups, the first of which has its first parameter twice and its last three times."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (20, 33), (7,), (5, 3), (40, 8)
    a, b, c, d = (Parameter(torch.randn(shape, generator=generator)) for shape in shapes)
    return [a, b, c, d], [{"params": [a, b, c, a, c, c]}, {"params": [d], "lr": 1e-3}]


def step(params, optimizer, steps: int) -> None:
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("chunk", [256, 1 << 20])
def test_exact_has_the_bits_of_torch(inner, chunk, store) -> None:
    ends = []
    for make in (inner, lambda p: wrap(inner(p), ConfigurablePolicy({}), chunk, store=store)):
        params, of = groups()
        optimizer = make(of)
        step(params, optimizer, 2)
        # what is saved loads into another one
        saved = copy.deepcopy(optimizer.state_dict())
        packed = getattr(optimizer, "packed_state_dict", optimizer.state_dict)()
        for state_dict in (saved, copy.deepcopy(packed)):
            again, of = groups(1)
            optimizer = make(of)
            optimizer.load_state_dict(state_dict)
            for param, old in zip(again, params, strict=True):
                param.data.copy_(old)
            params = again
            step(params, optimizer, 2)
        assert set(packed["state"]) == set(saved["state"])
        numbers = [group["params"] for group in saved["param_groups"]]
        ends.append((params, [optimizer.state[param] for param in params], numbers))
    assert ends[0][2] == ends[1][2]
    assert all(map(torch.equal, ends[0][0], ends[1][0]))
    for theirs, ours in zip(ends[0][1], ends[1][1], strict=True):
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("store", ["device", "host"])
def test_coded_state(inner, store, fused) -> None:
    ends = []
    for make in (
        inner,
        lambda p: wrap(inner(p), ConfigurablePolicy(CODED), store=store, fused=fused),
    ):
        params, of = groups()
        optimizer = make(of)
        step(params, optimizer, 3)
        ends.append((params, [optimizer.state[param].get("step") for param in params]))
    assert ends[0][1] == ends[1][1]
    for theirs, ours in zip(ends[0][0], ends[1][0], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0.1)
    # of what is there once, another code moves no more
    torch.testing.assert_close(ends[0][0][3], ends[1][0][3], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["here", "on the host", "gradients too"])
def test_stepped_on_the_host(kind) -> None:
    make = {
        "here": lambda p: CPUOffloadOptimizer(p, lr=1e-2),
        "on the host": pretends,
        "gradients too": lambda p: pretends(p, offload_gradients=True),
    }[kind]
    ends = []
    for maker in (INNER["AdamW fused"], make):
        params, of = groups()
        optimizer = maker(of)
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            grads = [torch.randn(param.shape, generator=generator) for param in params]
            sum((p * grad).sum() for p, grad in zip(params, grads, strict=True)).backward()
            if maker is make:
                optimizer.clip_grad_norm_(1.0)
            else:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(params)
    assert all(map(torch.equal, *ends))


def test_gradient_release_and_later_groups() -> None:
    ends = []
    for release in (False, True):
        params, of = groups()
        inner = INNER["AdamW"](of[1:])
        optimizer = wrap(inner, ConfigurablePolicy({}), 256) if release else inner
        optimizer.add_param_group(of[0])
        context = GradientRelease(optimizer, bucket_bytes=0) if release else None
        if context:
            context.attach()
        for _ in range(3):
            sum(param.square().sum() for param in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(params)
    assert all(map(torch.equal, *ends))


def test_each_parameter_is_counted_once() -> None:
    params, of = groups()
    optimizer = wrap(INNER["AdamW"](of), ConfigurablePolicy({}))
    assert optimizer.memory_report().parameters == sum(param.numel() for param in params)
