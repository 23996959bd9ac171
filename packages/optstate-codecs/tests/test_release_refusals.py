"""What gradient release refuses, and what is left after something goes wrong."""

import gc
import weakref

import pytest
import torch
from released import assert_same, backward, counts, make, run
from torch.nn import Parameter

from optstate_codecs import CodedOptimizer, GradientRelease
from optstate_codecs.gradients.freed_grad import has_gradient
from optstate_codecs.testing import SHAPES, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_nonfinite": True}, "skip_nonfinite=True: cannot"),
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1.0: must be None .* takes it itself"),
    ],
)
def test_options_of_the_optimizer_that_are_refused(options, message) -> None:
    trainer = Trainer(lambda params: make(params, **options), SHAPES)
    with pytest.raises(ValueError, match=message):
        GradientRelease(trainer.optimizer)
    for name in options:  # set later, it is noticed before anything is stepped
        later = Trainer(make, SHAPES)
        with GradientRelease(later.optimizer, bucket_bytes=0):
            setattr(later.optimizer, name, options[name])
            before = later.tensors()
            with pytest.raises(RuntimeError, match=message):
                backward(later)
            assert_same(later.tensors(), before)


def test_arguments_are_checked() -> None:
    params = [Parameter(torch.zeros(3))]
    with pytest.raises(TypeError, match=r"optimizer=AdamW: must be .* optstate_wrap\.wrap"):
        GradientRelease(torch.optim.AdamW(params))
    with pytest.raises(TypeError, match="bucket_bytes"):
        GradientRelease(make(params), bucket_bytes=1.5)
    with pytest.raises(ValueError, match="max_grad_norm"):
        GradientRelease(make(params), max_grad_norm=0.0)
    optimizer = make(params)
    with (
        GradientRelease(optimizer),
        pytest.raises(RuntimeError, match="another GradientRelease"),
    ):
        GradientRelease(optimizer).attach()
    GradientRelease(optimizer).attach().attach().detach()


def test_gradients_are_not_accumulated() -> None:
    trainer = Trainer(make, SHAPES)
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        backward(trainer)
        before = trainer.tensors()
        with pytest.raises(RuntimeError, match="a second gradient in one step") as caught:
            backward(trainer)
        assert "parameters [0, 1, 2" in str(caught.value)
        assert_same(trainer.tensors(), before)
        with pytest.raises(RuntimeError, match="backward has failed"):
            trainer.optimizer.step()
        assert_same(trainer.tensors(), before)
        trainer.optimizer.zero_grad()
        run(trainer, 1)
    assert max(counts(trainer)) == 2


def test_a_gradient_that_is_put_back_is_noticed() -> None:
    trainer = Trainer(make, SHAPES)
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        backward(trainer)
        trainer.params[0].grad = torch.zeros_like(trainer.params[0])
        with pytest.raises(RuntimeError, match="parameter 0: a second gradient"):
            trainer.optimizer.step()


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
def test_a_learning_rate_that_changes_too_late_is_noticed(lr) -> None:
    trainer = Trainer(lambda params: make([{"params": params, "lr": lr}]), SHAPES)
    group = trainer.optimizer.param_groups[0]
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        run(trainer, 1)
        group["lr"] *= 0.5  # in between is where schedulers change it
        run(trainer, 1)
        backward(trainer)
        group["lr"] *= 0.5
        with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['lr'\]: has changed"):
            trainer.optimizer.step()


def test_closures_and_scalers_are_refused() -> None:
    trainer = Trainer(make, SHAPES)
    with GradientRelease(trainer.optimizer):
        with pytest.raises(ValueError, match="closure: must be None"):
            trainer.optimizer.step(lambda: 0.0)
        with pytest.raises(ValueError, match="closure: must be None"):
            trainer.optimizer.step(closure=lambda: 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for unscaled in (False, True):
            scaler.scale((trainer.params[0] * 2).sum()).backward()
            if unscaled:
                scaler.unscale_(trainer.optimizer)
            with pytest.raises(RuntimeError, match="GradScaler: cannot be combined"):
                scaler.step(trainer.optimizer)
            trainer.optimizer.step()
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert not trainer.optimizer._step_supports_amp_scaling


# torch warns once in a process
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_higher_derivatives_are_refused() -> None:
    trainer = Trainer(make, SHAPES)
    with (
        GradientRelease(trainer.optimizer),
        pytest.raises(RuntimeError, match="create_graph=True"),
    ):
        trainer.params[0].square().sum().backward(create_graph=True)


def test_several_workers_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    trainer = Trainer(make, SHAPES)
    with pytest.raises(ValueError, match=r"allow_distributed=False: .* several workers"):
        GradientRelease(trainer.optimizer)
    GradientRelease(trainer.optimizer, allow_distributed=True)


def test_captures_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("optstate_codecs.gradients.release.capturing", lambda: True)
    trainer = Trainer(make, SHAPES)
    with (
        GradientRelease(trainer.optimizer, bucket_bytes=0),
        pytest.raises(RuntimeError, match="CUDA graph capture: cannot be combined"),
    ):
        backward(trainer)


# what goes wrong


def test_an_error_in_a_step_leaves_all_usable(monkeypatch) -> None:
    trainer, calls = Trainer(make, SHAPES), iter(range(100))
    real = CodedOptimizer.step_part

    def failing(*args) -> None:
        if next(calls) == 2:
            raise OSError("boom")
        real(*args)

    monkeypatch.setattr(CodedOptimizer, "step_part", failing)
    last = len(SHAPES) - 1
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        with pytest.raises(RuntimeError, match="OSError: boom") as caught:
            sum((p * p).sum() for p in trainer.params).backward()
        assert isinstance(caught.value.__cause__, OSError)
        stepped = [i for i, p in enumerate(trainer.params) if trainer.optimizer.state.get(p)]
        assert len(stepped) == 2
        assert f"parameters {stepped} had been stepped, and [" in str(caught.value)
        trainer.optimizer.zero_grad()
        sum((p * p).sum() for p in trainer.params).backward()
        trainer.optimizer.step()
    assert sorted(counts(trainer)) == [1] * (last - 1) + [2, 2]


def test_an_error_elsewhere_needs_to_be_abandoned() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise OSError("boom")

    first, second = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = make([first, second])
    with GradientRelease(optimizer, bucket_bytes=0) as release:
        for _ in range(2):
            with pytest.raises(OSError, match="boom"):
                (Fails.apply(first * 2) * second).sum().backward()
            assert first.grad is None
            release.abandon()
            optimizer.zero_grad()
        (first * second).sum().backward()
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (first, second)] == [1, 3]


def test_what_still_needs_the_old_parameter_fails(monkeypatch) -> None:
    """A use that autograd does not know of must not see the new value in silence."""

    def kernel(self, params, factor) -> None:
        for param in params:
            param.data.add_(1.0)  # where autograd does not see it

    monkeypatch.setattr(CodedOptimizer, "step_part", kernel)
    weight = Parameter(torch.ones(4))
    early = Parameter(torch.ones(4))
    loss = ((early * weight.detach()) * weight).sum()
    with (
        GradientRelease(make([early, weight]), bucket_bytes=0),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        loss.backward()


def test_detached_in_the_middle_a_step_is_completed() -> None:
    ours, whole = Trainer(make, SHAPES), Trainer(make, SHAPES)
    for _ in range(3):
        with GradientRelease(ours.optimizer, bucket_bytes=2000):
            backward(ours)
        ours.optimizer.step()
        ours.optimizer.zero_grad()
        ours.time += 1
    assert_same(ours.tensors(), run(whole, 3))


def test_attached_it_lives_as_long_as_the_optimizer() -> None:
    trainer = Trainer(make, SHAPES)
    alive = weakref.ref(GradientRelease(trainer.optimizer, bucket_bytes=0).attach())
    gc.collect()
    backward(trainer)
    assert not any(has_gradient(param) for param in trainer.params)
    trainer.optimizer = None
    gc.collect()
    assert alive() is None
    assert all(param.grad is None for param in trainer.params)
    backward(trainer)
    assert has_gradient(trainer.params[0])


def test_autograd_grad_steps_nothing() -> None:
    trainer = Trainer(make, SHAPES)
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        before = trainer.tensors()
        torch.autograd.grad((trainer.params[0] * 2).sum(), trainer.params[0])
        assert_same(trainer.tensors(), before)
