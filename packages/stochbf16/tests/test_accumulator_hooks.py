"""Whatever happens around a micro-batch, its gradients are in the sum once, or not at all.

Gradients are such that bfloat16 holds their sums.
"""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from micro_batches import BF16, Bad, a_param, give, interrupted, values
from torch import Tensor, nn

from stochbf16 import StochasticAccumulator


def test_autograd_grad_leaves_sums_alone() -> None:
    first, second = a_param(4), a_param(4)
    with StochasticAccumulator([first, second]):
        give((first, 1.0), (second, 1.0))
        totals = first.grad, second.grad
        one, two = torch.autograd.grad((first * 2 + second * 3).sum(), [first, second])
        assert (one == 2).all()
        assert (two == 3).all()
        late = Bad.apply(second).sum()
        with pytest.raises(ArithmeticError, match="on purpose"):
            torch.autograd.grad(late + (first * 2).sum(), [first, second])
        assert first.grad is totals[0]
        assert second.grad is totals[1]
        give((first, 1.0), (second, 1.0), inputs=[first])
        assert values(first, second) == [2.0, 1.0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_that_share_a_parameter(reentrant: bool) -> None:
    shared, plain = a_param(4), a_param(4)
    attached = StochasticAccumulator([shared]).attach()
    for param in (shared, plain):
        for _ in range(3):
            x = torch.ones(4, dtype=BF16, requires_grad=True)
            for _ in range(3):
                x = torch.utils.checkpoint.checkpoint(
                    lambda x, param=param: x + param, x, use_reentrant=reentrant
                )
            x.sum().backward()
    attached.detach()
    assert values(shared) == values(plain) == [9.0]


def test_other_hooks_see_the_sum(launches: list[int]) -> None:
    param, other = a_param(4), a_param(4)
    seen: list[float] = []

    def look(param: Tensor) -> None:
        seen.extend(v for v in values(param) if v is not None)

    early = param.register_post_accumulate_grad_hook(look)
    attached = StochasticAccumulator([param, other]).attach()
    late = param.register_post_accumulate_grad_hook(look)
    for _ in range(3):
        give((param, 1.0), (other, 1.0))
    assert seen == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    for hook in (early, late):
        hook.remove()
    attached.detach()


def test_an_optimizer_in_the_backward() -> None:
    param = a_param(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    calls = []

    def step(_: Tensor) -> None:
        calls.append(values(param))
        if len(calls) % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()

    param.register_post_accumulate_grad_hook(step)
    with StochasticAccumulator([param]):
        for _ in range(4):
            give((param, 1.0))
    assert calls == [[1.0], [2.0], [1.0], [2.0]]
    assert param.tolist() == [-4.0] * 4


def test_hooks_that_change_the_gradient() -> None:
    param = a_param(4)
    with StochasticAccumulator([param]):
        param.register_hook(lambda grad: grad * 2)
        for _ in range(3):
            give((param, 1.0))
    assert values(param) == [6.0]


def test_an_interrupted_backward_is_completed_by_the_next() -> None:
    good, bad = a_param(4), a_param(4)
    with StochasticAccumulator([good, bad]):
        give((good, 1.0), (bad, 1.0))
        interrupted(good, bad)
        give((good, 1.0), (bad, 1.0))
        # what torch does: gradients that came are in, the others are not
        assert values(good, bad) == [3.0, 2.0]


@pytest.mark.parametrize("how", ["zero", "none", "replace"])
def test_an_interrupted_backward_does_not_leak(how: str) -> None:
    good, bad = a_param(4), a_param(4)
    with StochasticAccumulator([good, bad]):
        give((good, 1.0), (bad, 1.0))
        interrupted(good, bad)
        taken = good.grad
        optimizer = torch.optim.SGD([good, bad], lr=1.0)
        optimizer.zero_grad(set_to_none=how != "zero")
        if how == "replace":
            good.grad = torch.zeros(4, dtype=BF16)
        give((good, 1.0), (bad, 1.0))
        give((good, 1.0), (bad, 1.0))
        assert values(good, bad) == [2.0, 2.0]
        # who took the sum has it as it was
        assert taken is good.grad if how == "zero" else taken.tolist() == [1.0] * 4


@pytest.mark.parametrize("end", ["detach", "reassign", "leave"])
def test_what_waits_is_added_at_the_end(end: str) -> None:
    model = nn.ParameterList([a_param(4), a_param(4)])
    good, bad = model
    attached = StochasticAccumulator(model).attach()
    give((good, 1.0), (bad, 1.0))
    if end == "leave":
        with attached:
            interrupted(good, bad)
    else:
        interrupted(good, bad)
        attached.detach() if end == "detach" else attached.reassign_grad_buffer(model)
    assert values(good, bad) == [2.0, 1.0]
    attached.detach()
    assert values(good, bad) == [2.0, 1.0]


def test_an_error_of_another_hook_does_not_leak() -> None:
    param = a_param(4)

    def fail(_: Tensor) -> None:
        raise ArithmeticError("on purpose")

    with StochasticAccumulator([param]) as attached:
        give((param, 1.0))
        hook = param.register_hook(fail)
        with pytest.raises(ArithmeticError, match="on purpose"):
            give((param, 1.0))
        hook.remove()
        param.grad = None
        for expected in (1.0, 2.0, 3.0):
            give((param, 1.0))
            assert values(param) == [expected]
        assert not attached._taken


def test_interrupted_backward_keeps_no_gradient_for_ever() -> None:
    good, bad = a_param(4), a_param(4)
    with StochasticAccumulator([good, bad]) as attached:
        give((good, 1.0), (bad, 1.0))
        interrupted(good, bad)
        (waiting,) = attached._pending.values()
        (addition,) = waiting._additions.values()
        new = weakref.ref(addition.new)
        del addition
        good.grad = None
        give((bad, 1.0))
        assert new() is None


def test_attaching_twice_and_detaching_twice(launches: list[int]) -> None:
    param = a_param(4)
    attached = StochasticAccumulator([param])
    assert attached.attach() is attached.attach()
    give((param, 1.0))
    give((param, 1.0))
    attached.detach()
    attached.detach()
    give((param, 1.0))
    assert launches == [1]
    assert values(param) == [3.0]
    assert not param._backward_hooks
    assert not param._post_accumulate_grad_hooks
    with attached:
        give((param, 1.0))
    assert launches == [1, 1]


def test_two_accumulators_add_once() -> None:
    param = a_param(4)
    with StochasticAccumulator([param]), StochasticAccumulator([param]):
        for _ in range(3):
            give((param, 1.0))
    assert values(param) == [3.0]


def test_detaching_within_a_backward() -> None:
    first, second = a_param(4), a_param(4)
    attached = StochasticAccumulator([first, second]).attach()
    for moment in (first.register_hook, first.register_post_accumulate_grad_hook):
        give((first, 1.0), (second, 1.0))
        handle = moment(lambda _: attached.detach())
        give((first, 1.0), (second, 1.0))
        handle.remove()
        assert values(first, second) == [2.0, 2.0]
        first.grad = second.grad = None
        attached.attach()
    attached.detach()


def test_the_names_that_users_know() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2, dtype=BF16), "b": nn.Linear(2, 2)})
    model["a"].bias.requires_grad_(False)
    a, b = model["a"].weight, model["b"].weight
    StochasticAccumulator.reassign_grad_buffer(model)
    handles = StochasticAccumulator.assign_hooks(model)
    assert len(handles) == 3
    for _ in range(2):
        for _ in range(4):
            give((a, 1.0), (b, 1.0))
        for _ in range(2):
            StochasticAccumulator.reassign_grad_buffer(model)
        assert values(a, b, model["b"].bias) == [4.0, 4.0, None]
        model.zero_grad()
    for handle in handles:
        handle.remove()
        handle.remove()
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_accumulators_go_with_their_model() -> None:
    model = nn.Linear(3, 2, dtype=BF16)
    StochasticAccumulator.assign_hooks(model)
    give((model.weight, 1.0))
    give((model.weight, 1.0))
    gone = weakref.ref(model.weight)
    del model
    gc.collect()
    assert gone() is None


def test_copies_and_files_have_no_hooks() -> None:
    model = nn.Linear(3, 2, bias=False, dtype=BF16)
    with StochasticAccumulator(model):
        give((model.weight, 1.0))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            twin.zero_grad()
            give((twin.weight, 1.0))
            give((twin.weight, 1.0))
            assert values(twin.weight) == [2.0]
        assert values(model.weight) == [1.0]


@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_scaler(clip: bool) -> None:
    param = a_param(16)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD([param], lr=1.0)
    with StochasticAccumulator([param]):
        for bad in (False, True, False):
            for batch in range(3):
                loss = (param * (float("inf") if bad and batch == 1 else 1.0)).sum()
                scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([param], 6.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert param.tolist() == [-3.0 if clip else -6.0] * 16


def test_compiled_models() -> None:
    model = nn.Linear(4, 3, bias=False, dtype=BF16)
    compiled = torch.compile(model, backend="aot_eager")
    with StochasticAccumulator(model):
        for _ in range(3):
            compiled(torch.ones(2, 4, dtype=BF16)).sum().backward()
    assert values(model.weight) == [6.0]


def test_a_compiler_around_the_backward_does_not_look_into_it() -> None:
    def train(model: nn.Module, x: Tensor) -> None:
        (model(x) * 0.03).square().mean().backward()

    results = []
    torch._dynamo.reset()
    for step in (train, torch.compile(train, backend="eager")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(BF16)
        with StochasticAccumulator(model):
            for batch in range(8):
                step(model, torch.ones(3, 8, dtype=BF16) + batch)
        results.append([param.grad for param in model.parameters()])
    torch._dynamo.reset()
    assert all(map(torch.equal, *results))


def test_backwards_in_two_threads() -> None:
    params = [a_param(64), a_param(64)]
    errors = []

    def work(param: Tensor) -> None:
        try:
            for _ in range(50):
                give((param, 1.0))
        except Exception as error:
            errors.append(error)

    with StochasticAccumulator(params):
        threads = [threading.Thread(target=work, args=(param,)) for param in params]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert values(*params) == [50.0, 50.0]


def test_parameters_that_are_frozen_before_the_backward() -> None:
    frozen, param = a_param(4), a_param(4)
    with StochasticAccumulator([frozen, param]) as attached:
        give((frozen, 1.0), (param, 1.0))
        loss = (param * 1.0).sum() + (frozen * 1.0).sum()
        frozen.requires_grad_(False)
        loss.backward()
        assert not attached._taken
    assert values(frozen, param) == [1.0, 2.0]
    assert attached.state_dict()["additions"] == [0, 1]


def test_parameters_that_are_thawed_later() -> None:
    model = nn.Linear(3, 2, dtype=BF16)
    model.bias.requires_grad_(False)
    attached = StochasticAccumulator(model).attach()
    model.bias.requires_grad_()
    attached.attach()
    give((model.bias, 1.0))
    give((model.bias, 1.0))
    attached.detach()
    assert attached.state_dict()["additions"] == [0, 1]
