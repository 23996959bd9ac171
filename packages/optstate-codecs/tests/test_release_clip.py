"""Two passes clip by the global norm as the optimizers themselves and torch do."""

from functools import partial

import pytest
import torch
from released import BUCKETS, assert_same, backward, make, run
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from optstate_codecs import GradientRelease
from optstate_codecs.gradients.freed_grad import has_gradient
from optstate_codecs.testing import SHAPES, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")


@pytest.mark.parametrize("size", BUCKETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_clipping_is_that_of_the_optimizer(size, dtype) -> None:
    """As ``max_grad_norm`` of the optimizer, and for float32 as ``clip_grad_norm_``."""
    ours, whole = Trainer(make, SHAPES, dtype), Trainer(make, SHAPES, dtype)
    whole.optimizer.max_grad_norm = 0.7
    clipped = Trainer(make, SHAPES, dtype)
    with GradientRelease(ours.optimizer, bucket_bytes=size, max_grad_norm=0.7) as release:
        for _ in range(5):
            with release.measure():
                backward(ours)
            assert not any(has_gradient(param) for param in ours.params)
            run(ours, 1, zero=False)
            run(whole, 1)
            assert torch.equal(release.grad_norm, whole.optimizer.grad_norm)
            backward(clipped)
            norm = clip_grad_norm_(clipped.params, 0.7)
            assert norm > 0.7
            clipped.optimizer.step()
            clipped.optimizer.zero_grad()
            clipped.time += 1
    assert_same(ours.tensors(), whole.tensors())
    if dtype == torch.float32:
        assert torch.equal(release.grad_norm, norm)
        assert_same(ours.tensors(), clipped.tensors())


def summed(params, factors):
    return sum((p * f).sum().double() for p, f in zip(params, factors, strict=True))


def test_norms_of_several_dtypes_are_summed_as_the_optimizer_sums_them() -> None:
    results = []
    for released in (True, False):
        generator = torch.Generator().manual_seed(0)
        dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16]
        params = [Parameter(torch.randn(77, generator=generator).to(d)) for d in dtypes]
        optimizer = make(params)
        factors = [torch.randn(77, generator=generator).to(d) for d in dtypes]

        loss = partial(summed, params, factors)
        if released:
            with GradientRelease(optimizer, bucket_bytes=400, max_grad_norm=0.1) as release:
                with release.measure():
                    loss().backward()
                loss().backward()
                optimizer.step()
            norm = release.grad_norm
        else:
            optimizer.max_grad_norm = 0.1
            loss().backward()
            optimizer.step()
            norm = optimizer.grad_norm
        results.append([norm, *params])
    assert all(map(torch.equal, *results))


def test_the_second_pass_drops_out_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Dropout(0.5), nn.Linear(30, 4))
    optimizer = make(model.parameters())
    norms = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: norms.append(float(p.grad.norm())))
    with GradientRelease(optimizer, max_grad_norm=1.0) as release:
        with release.measure():
            model(torch.ones(5, 20)).square().sum().backward()
        model(torch.ones(5, 20)).square().sum().backward()
    assert norms[:4] == norms[4:]


def test_measuring_must_come_first() -> None:
    trainer = Trainer(make, SHAPES)
    with GradientRelease(trainer.optimizer, bucket_bytes=0, max_grad_norm=1.0) as release:
        before = trainer.tensors()
        with pytest.raises(RuntimeError, match=r"inside measure\(\) first"):
            backward(trainer)
        assert_same(trainer.tensors(), before)
        trainer.optimizer.zero_grad()
        with release.measure():
            backward(trainer)
            with pytest.raises(RuntimeError, match="second gradient"):
                backward(trainer)
        trainer.optimizer.zero_grad()
        trainer.params[0].grad = torch.zeros_like(trainer.params[0])
        with pytest.raises(RuntimeError, match="no gradients there"), release.measure():
            pass
    plain = GradientRelease(trainer.optimizer)
    with pytest.raises(ValueError, match="max_grad_norm=None"), plain.measure():
        pass
