"""Between backward and step, freed gradients are noticed by whatever looks for them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from released import BUCKETS, assert_same, backward, make, run
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from optstate_codecs import GradientRelease, memory_report
from optstate_codecs.testing import SHAPES, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")
# those of the shapes that are stepped in a bucket of their own
SMALL = ((30, 30), (20,), (10, 10))


class Accelerator:
    """Clips as the trainers do that other libraries have."""

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        parameters = [p for p in parameters if p.requires_grad]
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)


def in_two_steps(params) -> None:
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    nn.utils.clip_grads_with_norm_(params, 0.5, norm)


def with_norm_known_before(params) -> None:
    nn.utils.clip_grads_with_norm_(params, 0.5, torch.ones(()))


def by_hand(params) -> None:
    for param in params:
        if param.grad is not None:
            param.grad.data.clamp_(-1, 1)


LOOKS = {
    "clip_grad_norm_": lambda params: torch.nn.utils.clip_grad_norm_(params, 0.5),
    "of a generator": lambda params: nn.utils.clip_grad_norm_((p for p in params), 0.5),
    "imported": lambda params: clip_grad_norm_(params, 0.5),
    "foreach": lambda params: clip_grad_norm_(params, 0.5, foreach=True),
    "one after the other": lambda params: clip_grad_norm_(params, 0.5, foreach=False),
    "infinite": lambda params: clip_grad_norm_(params, 0.5, float("inf")),
    "one parameter": lambda params: clip_grad_norm_(params[0], 0.5),
    "clip_grad_value_": lambda params: nn.utils.clip_grad_value_(params, 0.5),
    "value imported": lambda params: clip_grad_value_(params, 0.5, foreach=True),
    "in two steps": in_two_steps,
    "norm known before": with_norm_known_before,
    "accelerate": lambda params: Accelerator().clip_grad_norm_(params, 0.5),
    "by hand": by_hand,
    "logged": lambda params: [p.grad.norm().item() for p in params],
    "printed values": lambda params: params[0].grad.tolist() and params[0].grad.cpu(),
    "saved": lambda params: pickle.dumps([p.grad for p in params]),
}
ERRORS = r"GradientRelease: .* max_grad_norm=|not supported for tensor subclasses"


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_who_looks_for_gradients_is_told(look) -> None:
    ours, whole = Trainer(make, SMALL), Trainer(make, SMALL)
    with GradientRelease(ours.optimizer, bucket_bytes=0):
        for _ in range(2):
            backward(ours)
            before = ours.tensors()
            with pytest.raises(RuntimeError, match=ERRORS):
                look(ours.params)
            assert_same(ours.tensors(), before)
            ours.optimizer.step()
            assert all(param.grad is None for param in ours.params)
            ours.time += 1
    assert_same(ours.tensors(), run(whole, 2))


def test_the_error_says_what_to_do() -> None:
    trainer = Trainer(make, SMALL)
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        backward(trainer)
        with pytest.raises(RuntimeError) as caught:
            clip_grad_norm_(trainer.params, 1.0)
    assert "use GradientRelease(optimizer, max_grad_norm=...) with measure()" in str(caught.value)
    assert "max_grad_norm=0 for transformers.Trainer" in str(caught.value)


def test_two_passes_are_told_that_gradients_are_clipped() -> None:
    ours, whole = Trainer(make, SMALL), Trainer(make, SMALL)
    whole.optimizer.max_grad_norm = 0.7
    with GradientRelease(ours.optimizer, bucket_bytes=0, max_grad_norm=0.7) as release:
        for _ in range(2):
            with release.measure():
                backward(ours)
            for _ in range(2):  # after the first backward, and after the second
                with pytest.raises(RuntimeError, match=r"max_grad_norm=0\.7 has clipped it"):
                    clip_grad_norm_(ours.params, 0.7)
                if not release._stepped:
                    backward(ours)
            ours.optimizer.step()
            ours.time += 1
    assert_same(ours.tensors(), run(whole, 2))


def clipped(grad: torch.Tensor) -> torch.Tensor:
    return grad * (0.5 / (grad.double().norm() + 1e-6)).float()


def test_other_parameters_are_clipped_as_ever() -> None:
    trainer, other = Trainer(make, SMALL), Parameter(torch.ones(50))
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        backward(trainer)
        other.grad = torch.arange(50.0)
        assert float(clip_grad_norm_([other], 0.5)) == pytest.approx(201.0597, rel=1e-6)
        torch.testing.assert_close(other.grad, clipped(torch.arange(50.0)))
        clip_grad_value_([other], 0.05)
        assert other.grad.max() == torch.tensor(0.05)
        # with freed ones, before any is scaled
        before = other.grad.clone()
        with pytest.raises(RuntimeError, match="GradientRelease"):
            clip_grad_norm_([other, *trainer.params], 1e-3)
        assert torch.equal(other.grad, before)


def test_gradients_that_wait_for_the_step_are_clipped_as_ever() -> None:
    first, second = Parameter(torch.ones(50)), Parameter(torch.ones(50))
    optimizer, scale = make([first, second]), torch.arange(50.0)
    with GradientRelease(optimizer):  # one bucket, of which one has no gradient
        (first * scale).sum().backward()
        clip_grad_norm_([first, second], 0.5)
        torch.testing.assert_close(first.grad, clipped(scale))
        optimizer.step()
    assert optimizer.state[first]["step"] == 1


def clips(params) -> None:
    """Whether clipping works, with gradients of ones."""
    sum(p.sum() for p in params).backward()
    norm = sum(p.numel() for p in params) ** 0.5
    assert float(clip_grad_norm_(params, 0.5)) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("end", ["detach", "abandon", "step", "zero_grad", "optimizer is gone"])
def test_afterwards_all_is_as_ever(end) -> None:
    trainer = Trainer(make, SMALL)
    params = trainer.params
    release = GradientRelease(trainer.optimizer, bucket_bytes=0).attach()
    backward(trainer)
    if end == "detach":
        release.detach()
    elif end == "abandon":
        release.abandon()
        release.detach()
    elif end == "optimizer is gone":
        trainer.optimizer = release = None
        gc.collect()
    else:
        getattr(trainer.optimizer, end)()
        assert all(param.grad is None for param in params)
        assert clip_grad_norm_(params, 0.5) == 0.0
        release.detach()
    assert all(param.grad is None for param in params)
    clips(params)


@pytest.mark.parametrize("foreach", [False, True])
def test_zeroing_in_place_is_no_error(foreach) -> None:
    first, second = Parameter(torch.ones(50)), Parameter(torch.ones(50))
    optimizer = make([first, second], foreach=foreach)
    with GradientRelease(optimizer, bucket_bytes=0):
        first.sum().backward()
        second.grad = torch.ones(50)
        optimizer.zero_grad(set_to_none=False)
        assert torch.equal(second.grad, torch.zeros(50))
        optimizer.step()
    assert optimizer.state[first]["step"] == 1


@pytest.mark.parametrize("size", BUCKETS)
def test_freed_gradients_take_no_memory(size) -> None:
    trainer = Trainer(make, SMALL)
    with GradientRelease(trainer.optimizer, bucket_bytes=size):
        backward(trainer)
        assert memory_report(trainer.optimizer).gradient_bytes == 0
        grad = trainer.params[0].grad
        assert grad.shape == trainer.params[0].shape
        assert (grad.nbytes, grad.untyped_storage().nbytes()) == (0, 0)
        assert repr(grad) == "FreedGradient(shape=(30, 30), dtype=torch.float32)"
        copy.deepcopy(nn.ParameterList(trainer.params))


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_an_attached_model_is_collected(max_norm) -> None:
    trainer = Trainer(make, SHAPES)
    GradientRelease(trainer.optimizer, bucket_bytes=2000, max_grad_norm=max_norm).attach()
    alive = [weakref.ref(param) for param in trainer.params if param.requires_grad]
    del trainer
    gc.collect()
    assert not any(ref() is not None for ref in alive)


@pytest.mark.cuda
def test_on_a_gpu_who_looks_is_told() -> None:
    params = [Parameter(torch.ones(300, 300, device="cuda")) for _ in range(3)]
    optimizer = make(params)
    with GradientRelease(optimizer, bucket_bytes=0):
        sum(p.square().sum() for p in params).backward()
        for foreach in (None, True, False):
            with pytest.raises(RuntimeError, match=r"GradientRelease: .* max_grad_norm="):
                clip_grad_norm_(params, 1.0, foreach=foreach)
        assert memory_report(optimizer).gradient_bytes == 0
        optimizer.step()
    clips(params)
