"""What torch's own tools expect of an optimizer: schedulers, scaler, closures, copies, clipping."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lowbit_adam import Adam8bit, AdamW8bit
from turboadam import TurboAdam

OPTIMIZERS = [Adam8bit, AdamW8bit, TurboAdam]


@pytest.fixture(params=OPTIMIZERS, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> type[torch.optim.Optimizer]:
    return request.param


def make_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5))


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 7, generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int) -> torch.Tensor:
    model.zero_grad()
    loss = (model(batch(step)) - 1).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=12),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_scheduler_drives_lr_and_momentum_as_it_does_torch(cls, make) -> None:
    seen = []
    for optimizer_class in (cls, torch.optim.AdamW):
        model = make_model()
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        scheduler = make(optimizer)
        values = []
        for step in range(8):
            backward(model, step)
            optimizer.step()
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(1.0) if plateau else scheduler.step()
            values.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        seen.append(values)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 1


def test_scheduled_lr_reaches_the_step(cls) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda n: float(n == 0))
    train(model, optimizer, range(1))
    scheduler.step()
    before = copy.deepcopy(model)
    train(model, optimizer, range(1, 3))
    assert_same(before, model)


def test_schedule_goes_on_after_load(cls) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(model, optimizer, range(1))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


def test_tensor_lr_equals_float_lr(cls) -> None:
    models = [make_model(), make_model()]
    for model, lr in zip(models, (1e-2, torch.tensor(1e-2)), strict=True):
        train(model, cls(model.parameters(), lr=lr), range(3))
    assert_same(*models)


def test_closure_runs_once_with_gradients(cls) -> None:
    plain, closed = make_model(), make_model()
    train(plain, cls(plain.parameters(), lr=1e-2), range(1))
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        calls.append(None)
        return backward(closed, 0)

    with torch.no_grad():
        loss = cls(closed.parameters(), lr=1e-2).step(closure)
    assert len(calls) == 1
    assert loss.item() > 0
    assert_same(plain, closed)


def test_grad_scaler_unscales(cls) -> None:
    plain, scaled = make_model(), make_model()
    train(plain, cls(plain.parameters(), lr=1e-2), range(3))
    optimizer = cls(scaled.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        scaled.zero_grad()
        loss = (scaled(batch(step)) - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(scaled.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_grad_scaler_skips_an_overflow(cls) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    train(model, optimizer, range(2))
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    backward(model, 2)
    scaler.scale(torch.ones(()))
    next(model.parameters()).grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same(before, model)
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(value, state["state"][number][key])


def test_deepcopy_and_pickle_go_on_equally(cls) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    twins = [
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ]
    train(model, optimizer, range(3, 6))
    for twin, twin_optimizer in twins:
        train(twin, twin_optimizer, range(3, 6))
        assert_same(model, twin)


def test_save_and_load_with_weights_only(cls) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(model)
    resumed_optimizer = cls(resumed.parameters(), lr=1e-2)
    resumed_optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, range(3, 6))
    torch.manual_seed(99)
    train(resumed, resumed_optimizer, range(3, 6))
    assert_same(model, resumed)


def test_step_hooks_fire_once_a_step(cls) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    train(model, optimizer, range(2))
    assert fired == ["pre", "post"] * 2


def test_named_parameters_keep_their_names(cls) -> None:
    optimizer = cls(make_model().named_parameters(), lr=1e-2)
    assert optimizer.param_groups[0]["param_names"] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]


def test_a_compiled_model_trains(cls) -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    optimizer = cls(compiled.parameters(), lr=3e-2)
    first = backward(compiled, 0)
    train(compiled, optimizer, range(30))
    assert backward(compiled, 0) < 0.5 * first
