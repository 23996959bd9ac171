"""``max_grad_norm``: clipping inside the step equals ``clip_grad_norm_`` before it."""

import copy
import pickle

import pytest
import torch
from subjects import EXACT, FIRST, SECOND
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.gradients.grad_norm import gradient_norm
from optstate_codecs.testing import SHAPES, Trainer

CODED = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
BACKENDS = [
    pytest.param("eager", "cpu", id="eager"),
    pytest.param("triton", "cpu", marks=pytest.mark.interpret, id="interpreter"),
    pytest.param("triton", "cuda", marks=pytest.mark.cuda, id="cuda"),
]


pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")


def make(params, formats=EXACT, **options):
    return CodedOptimizer(params, Adam(decoupled=True), formats, **options)


def gradients(trainer: Trainer, spread: float = 1.0) -> None:
    """This step's gradients, long ones and short ones in turn."""
    for i, param in enumerate(trainer.params):
        grad = trainer.gradient(i)
        param.grad = None if grad is None else grad * (spread if trainer.time % 2 else 1e-4)
    trainer.time += 1


def same(ours: Trainer, theirs: Trainer) -> None:
    for mine, other in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_formats_equal_torch_after_clipping(dtype) -> None:
    """Law 1, with clipping on both sides."""
    ours = Trainer(lambda params: make(params, max_grad_norm=0.7), SHAPES, dtype)
    exact = Trainer(lambda p: torch.optim.AdamW(p, foreach=False), SHAPES, dtype)
    clipped = []
    for _ in range(30):
        gradients(ours)
        gradients(exact)
        before = [p.grad.clone() for p in ours.params if p.grad is not None]
        norm = clip_grad_norm_(exact.params, 0.7)
        ours.optimizer.step()
        exact.optimizer.step()
        clipped.append(bool(norm > 0.7))
        assert torch.equal(ours.optimizer.grad_norm, norm)
        after = [p.grad for p in ours.params if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        if dtype == torch.float32:
            same(ours, exact)
        else:  # moments of float64 parameters are float32
            for mine, other in zip(ours.params, exact.params, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert any(clipped)
    assert not all(clipped)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("formats", [EXACT, CODED], ids=["fp32", "dynamic8"])
def test_every_backend_equals_clipping_first(formats, backend, device) -> None:
    options = {"backend": backend}
    ours = Trainer(lambda p: make(p, formats, max_grad_norm=0.7, **options), SHAPES, device=device)
    theirs = Trainer(lambda p: make(p, formats, **options), SHAPES, device=device)
    for _ in range(4):
        gradients(ours)
        gradients(theirs)
        clip_grad_norm_(theirs.params, 0.7)
        ours.optimizer.step()
        theirs.optimizer.step()
        same(ours, theirs)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_gradients_are_unscaled_before_their_norm_is_taken(backend, device) -> None:
    options = {"fused": True, "backend": backend}
    ours = Trainer(lambda p: make(p, CODED, max_grad_norm=0.7, **options), SHAPES, device=device)
    theirs = Trainer(lambda p: make(p, CODED, **options), SHAPES, device=device)
    ours.optimizer.grad_scale = torch.tensor(2.0**14, device=device)
    for found in (0.0, 1.0, 0.0):
        for trainer in (ours, theirs):
            trainer.optimizer.found_inf = torch.tensor(found, device=device)
            gradients(trainer)
        for param in ours.params:
            if param.grad is not None:
                param.grad *= 2.0**14
        norm = clip_grad_norm_(theirs.params, 0.7)
        ours.optimizer.step()
        theirs.optimizer.step()
        torch.testing.assert_close(ours.optimizer.grad_norm, norm, rtol=1e-6, atol=0)
        same(ours, theirs)


def test_grad_scaler_hands_over_scale_and_clips() -> None:
    trained = []
    for options in ({"fused": True, "max_grad_norm": 0.5}, {}):
        param = Parameter(torch.ones(40))
        optimizer, scaler = make([param], **options), torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(3):
            optimizer.zero_grad()
            loss = (param * torch.linspace(-1, 1, 40) * (step + 1)).sum()
            scaler.scale(loss).backward()
            if not options:
                scaler.unscale_(optimizer)
                clip_grad_norm_([param], 0.5)
            scaler.step(optimizer)
            scaler.update()
        trained.append(param)
    assert torch.equal(*trained)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_norms_do_what_clip_grad_norm_does(bad) -> None:
    ours, theirs, kept = (Parameter(torch.ones(6)) for _ in range(3))
    for param in (ours, theirs, kept):
        param.grad = torch.tensor([1.0, bad, 0.0, -2.0, 3.0, 4.0])
    clip_grad_norm_([theirs], 1.0)
    make([ours], max_grad_norm=1.0).step()
    make([theirs]).step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert ours.isnan().any()
    make([kept], max_grad_norm=1.0, skip_nonfinite=True).step()
    assert torch.equal(kept, torch.ones(6))


def test_the_norm_of_narrow_gradients_is_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(5000, generator=generator) for _ in range(3)]
    for dtypes in ([torch.bfloat16] * 3, [torch.float16, torch.float32, torch.bfloat16]):
        grads = [x.to(dtype) for x, dtype in zip(wide, dtypes, strict=True)]
        expected = torch.cat([g.double() for g in grads]).norm()
        got = gradient_norm(grads)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    assert float(gradient_norm([torch.zeros(0)])) == 0.0


def test_sharded_gradients_are_refused_before_anything_changes() -> None:
    class Sharded(torch.Tensor):
        placements = ()

    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3).as_subclass(Sharded)
    optimizer = make([param], max_grad_norm=1.0)
    with pytest.raises(TypeError, match="gradient of parameter 0: is a DTensor"):
        optimizer.step()
    assert not optimizer.state


def test_copies_and_pickles_keep_it() -> None:
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = make([param], max_grad_norm=0.5)
    assert optimizer.grad_norm is None
    optimizer.step()
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.max_grad_norm == 0.5
        (other,) = copied.param_groups[0]["params"]
        other.grad = torch.ones(3)
        copied.step()
        assert float(copied.grad_norm) == pytest.approx(3**0.5)
    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.grad_norm is None
