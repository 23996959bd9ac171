"""Parameters and state that are elsewhere in memory, or of another shape, than a step before.

Beside each case ``torch.optim.AdamW`` does the same.
"""

from weakref import ref

import pytest
import torch
from subjects import EXACT, SECOND
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer, decode_state, offload

CODED = {"exp_avg": "dynamic8(block_size=64)", "exp_avg_sq": SECOND}
BACKENDS = ("eager", "compile")


def ours(params, formats=EXACT, **options):
    rule = Adam(decoupled=True)
    return CodedOptimizer(params, rule, formats, lr=0.01, weight_decay=0.0, **options)


def gradient(shape, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(param, optimizer, seed: int) -> None:
    param.grad = gradient(param.shape, seed)
    optimizer.step()


def alike(mine: Tensor, theirs: Tensor) -> None:
    """The same but for the last places, in which torch's roots differ between processors."""
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def clone(value: Tensor) -> None:
    value.data = value.data.clone()


def set_(value: Tensor) -> None:
    with torch.no_grad():
        value.set_(value.detach().clone())


def share(value: Tensor) -> None:
    value.share_memory_()


MOVES = {"data": clone, "set_": set_, "share_memory_": share}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("what", ["state", "parameter"])
def test_what_was_moved_in_place_is_stepped_where_it_is(move, what, backend) -> None:
    theirs, mine = (Parameter(torch.ones(64, 48)) for _ in range(2))
    exact = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)
    optimizer = ours([mine], backend=backend)
    for seed in range(6):
        step(theirs, exact, seed)
        step(mine, optimizer, seed)
        alike(mine, theirs)
        if seed in (1, 3):
            # kept, so that a step that goes on there does no harm, and is seen by its result
            old = [mine.data, *(value.data for value in optimizer.state[mine].values())]
            for value in optimizer.state[mine].values() if what == "state" else [mine]:
                move(value)
    assert old
    for key, value in exact.state[theirs].items():
        alike(optimizer.state[mine][key], value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1024, 256], ids=["grown", "cropped"])
def test_another_shape_is_refused_as_torch_refuses_it(size: int, backend) -> None:
    for make in (lambda p: torch.optim.AdamW(p), lambda p: ours(p, CODED, backend=backend)):
        other, param = Parameter(torch.ones(33)), Parameter(torch.ones(512, 96))
        optimizer = make([other, param])
        step(other, optimizer, 0)
        step(param, optimizer, 0)
        param.data = torch.ones(1024, 96)[:size].clone()
        other.grad, param.grad = torch.ones(33), torch.ones(size, 96)
        with pytest.raises(RuntimeError, match="size"):
            optimizer.step()
    assert torch.equal(param, torch.ones(size, 96))
    before = other.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 1: state\['exp_avg_codes'\]: size mismatch"):
        optimizer.step()
    assert torch.equal(other, before)
    del optimizer.state[param]
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 1
    alike(param, torch.full_like(param, 0.99))


def test_a_view_of_the_same_memory_with_fewer_rows_is_refused() -> None:
    """Its address is what it was."""
    param = Parameter(torch.ones(512, 96))
    optimizer = ours([param], CODED, backend="compile")
    step(param, optimizer, 0)
    param.data = param.data[:100]
    param.grad = torch.ones(100, 96)
    with pytest.raises(RuntimeError, match="size mismatch"):
        optimizer.step()


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_stale_gradient_is_refused(offloaded: bool) -> None:
    param = Parameter(torch.ones(40, 16))
    optimizer = ours([param], CODED)
    if offloaded:
        offload(optimizer)
    step(param, optimizer, 0)
    grad = param.grad
    param.data = param.data[:20].clone()
    optimizer.state.clear()
    assert param.grad is grad
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"gradient of parameter 0: shape \(40, 16\), must be"):
        optimizer.step()
    assert torch.equal(param, before)
    assert not optimizer.state


@pytest.mark.parametrize("shape", [(20, 16), (40, 16, 1)], ids=str)
def test_a_gradient_of_another_shape_elsewhere_is_refused(shape) -> None:
    """With the dtype and, in the dimensions that both have, the strides of the step before."""
    param = Parameter(torch.ones(40, 16))
    optimizer = ours([param], CODED)
    for seed in range(2):
        step(param, optimizer, seed)
    assert param.grad is not None
    param.grad.data = torch.ones(shape)
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"gradient of parameter 0: shape .*, must be"):
        optimizer.step()
    assert torch.equal(param, before)


def test_gradients_are_freed_between_steps() -> None:
    param = Parameter(torch.ones(40, 16))
    optimizer = ours([param], CODED)
    for seed in range(3):
        step(param, optimizer, seed)
        grad = ref(param.grad)
        optimizer.zero_grad()
        assert grad() is None


def test_parameters_exchanged_within_their_group_keep_their_state() -> None:
    """The list stays the same object, and so do all addresses."""
    params = [Parameter(torch.ones(40, 16)) for _ in range(2)]
    optimizer = ours(params)
    for seed in range(2):
        params[0].grad, params[1].grad = gradient((40, 16), seed), gradient((40, 16), 9)
        optimizer.step()
    first, second = (optimizer.state[param]["exp_avg"] for param in params)
    members = optimizer.param_groups[0]["params"]
    members.reverse()
    members[0].grad, members[1].grad = torch.zeros(40, 16), torch.zeros(40, 16)
    before = first.clone(), second.clone()
    optimizer.step()
    for param, mean, old in zip(params, (first, second), before, strict=True):
        assert optimizer.state[param]["exp_avg"] is mean
        alike(mean, old * 0.9)


def test_growing_an_offloaded_parameter_leaves_all_as_it_was() -> None:
    params = [Parameter(torch.ones(64, 64)), Parameter(torch.ones(32, 64))]
    optimizer = offload(ours(params, CODED), chunk_bytes=1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    params[1].data = torch.ones(48, 64)
    params[1].grad = torch.ones(48, 64)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"parameter 1: .*size mismatch"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert float(optimizer.state[params[0]]["step"]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_lies_otherwise_at_the_same_address_is_read_as_it_lies(backend) -> None:
    theirs, mine = (Parameter(torch.ones(64, 64)) for _ in range(2))
    exact = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)
    optimizer = ours([mine], backend=backend)
    grad = gradient((64, 64), 0)
    for seed in range(4):
        given = grad if seed % 2 else grad.t()
        theirs.grad = mine.grad = given
        exact.step()
        optimizer.step()
        alike(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("formats", [EXACT, CODED], ids=["fp32", "dynamic8"])
def test_another_layout_in_memory_keeps_the_moments(formats, backend) -> None:
    """As ``model.to(memory_format=torch.channels_last)`` does between two steps."""
    exact_param = Parameter(torch.ones(8, 16, 3, 5))
    param = Parameter(torch.ones(8, 16, 3, 5))
    exact = torch.optim.AdamW([exact_param], lr=0.01, weight_decay=0.0)
    optimizer = ours([param], formats, backend=backend)
    for seed in range(3):
        step(exact_param, exact, seed)
        step(param, optimizer, seed)
    before = decode_state(optimizer, param)
    for one in (exact_param, param):
        one.data = one.data.to(memory_format=torch.channels_last)
    after = decode_state(optimizer, param)
    for key in ("exp_avg", "exp_avg_sq"):
        error = (after[key] - before[key]).norm() / before[key].norm()
        assert error < (0.05 if formats is CODED else 1e-30)
    step(exact_param, exact, 3)
    step(param, optimizer, 3)
    if formats is EXACT:
        alike(param, exact_param)
    else:
        torch.testing.assert_close(param, exact_param, rtol=0, atol=0.003)


def test_state_that_was_cleared_starts_again() -> None:
    theirs, mine = (Parameter(torch.ones(64, 48)) for _ in range(2))
    exact = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)
    optimizer = ours([mine], backend="compile")
    for seed in range(4):
        step(theirs, exact, seed)
        step(mine, optimizer, seed)
        alike(mine, theirs)
        if seed == 1:
            exact.state[theirs].clear()
            optimizer.state[mine].clear()
    assert float(optimizer.state[mine]["step"]) == 2


def test_state_on_another_device_is_named() -> None:
    param = Parameter(torch.ones(64))
    optimizer = ours([param])
    step(param, optimizer, 0)
    optimizer.state[param]["exp_avg"] = torch.zeros(64, device="meta")
    with pytest.raises(RuntimeError, match=r"state\['exp_avg'\]: on meta, must be on cpu"):
        optimizer.step()


def test_state_on_another_device_may_be_saved() -> None:
    """As that of parameters which are stepped elsewhere; only a step needs it beside them."""
    param = Parameter(torch.ones(64))
    optimizer = ours([param])
    step(param, optimizer, 0)
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[param][key] = torch.zeros(64, device="meta")
    assert optimizer.state_dict()["state"][0]["exp_avg"].is_meta
    with pytest.raises(RuntimeError, match=r"state\['exp_avg'\]: on meta, must be on cpu"):
        optimizer.step()
