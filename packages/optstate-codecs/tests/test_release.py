"""Gradient release gives the bits of a plain step, and frees gradients."""

import gc

import pytest
import torch
from released import BUCKETS, assert_same, counts, make, run
from subjects import EXACT, SUBJECTS
from torch import nn

from optstate_codecs import GradientRelease
from optstate_codecs.engine.cpu.choice import choice_of
from optstate_codecs.testing import SHAPES, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")


@pytest.mark.parametrize("size", BUCKETS)
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_bit_is_that_of_a_plain_step(subject, size) -> None:
    """With gradients that come and go, for every rule and format."""
    whole = Trainer(subject.make, SHAPES)
    ours = Trainer(subject.make, SHAPES)
    with GradientRelease(ours.optimizer, bucket_bytes=size):
        got = run(ours, 6, zero=False)
        assert all(param.grad is None for param in ours.params)
    assert_same(got, run(whole, 6))


@pytest.mark.parametrize("size", BUCKETS)
def test_exact_formats_are_torch(size) -> None:
    ours = Trainer(lambda params: make(params, EXACT), SHAPES)
    exact = Trainer(lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False), SHAPES)
    with GradientRelease(ours.optimizer, bucket_bytes=size):
        run(ours, 10, zero=False)
    run(exact, 10)
    assert all(map(torch.equal, ours.params, exact.params))


def grouped(params):
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-3, "weight_decay": 0.1}]
    return make(groups, centralization=0.5, amsgrad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_groups_schedules_and_frozen_parameters(dtype) -> None:
    results = []
    for released in (True, False):
        trainer = Trainer(grouped, SHAPES, dtype)
        trainer.params[1].requires_grad_(False)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.7)
        release = GradientRelease(trainer.optimizer, bucket_bytes=2000)
        if released:
            release.attach()
        for _ in range(5):
            run(trainer, 1)
            scheduler.step()
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.7**5)
        results.append(trainer.tensors())
    assert_same(*results)


@pytest.mark.parametrize("released", [True, False])
def test_steps_are_counted_once_and_hooks_run_once(released) -> None:
    trainer, seen = Trainer(make, SHAPES), []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    trainer.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    release = GradientRelease(trainer.optimizer, bucket_bytes=2000)
    if released:
        release.attach()
    run(trainer, 2)
    assert seen == ["before", "after"] * 2
    assert max(counts(trainer)) == 2


class Tied(nn.Module):
    """One weight used as embedding and as head, as language models have it, and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.layer = nn.Linear(16, 16)
        self.unused = nn.Linear(3, 3)

    def forward(self, tokens):
        hidden = self.layer(torch.tanh(self.layer(self.embedding(tokens))))
        return hidden @ self.embedding.weight.T


def train(model, optimizer, steps: int, *, checkpointed: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(0, 50, (4, 9), generator=generator)
        optimizer.zero_grad()
        if checkpointed:
            logits = torch.utils.checkpoint.checkpoint(model, tokens, use_reentrant=False)
        else:
            logits = model(tokens)
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("size", BUCKETS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_parameters_that_are_used_twice(size, checkpointed) -> None:
    ours, whole = Tied(), Tied()
    optimizer = make(ours.parameters())
    with GradientRelease(optimizer, bucket_bytes=size):
        got = train(ours, optimizer, 4, checkpointed=checkpointed)
    assert all(map(torch.equal, got, train(whole, make(whole.parameters()), 4)))
    assert ours.unused.weight not in optimizer.state


def test_a_part_is_stepped_by_the_backend_that_steps_the_whole(monkeypatch) -> None:
    """Loops are worth building for all parameters: a small bucket must not take another way."""
    taken = []
    choice_of.cache_clear()
    monkeypatch.setattr(
        "optstate_codecs.engine.cpu.choice.KernelChoice.decide",
        lambda self, elements, total, scalars: taken.append((elements, total)),
    )
    trainer = Trainer(make, ((30, 30), (20,), (10, 10)))
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        run(trainer, 1)
    assert sorted(taken) == [(20, 1020), (100, 1020), (900, 1020)]


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_a_compiler_around_the_training_step_does_not_look_into_it(max_norm) -> None:
    def train(model, optimizer, release, x) -> None:
        if max_norm is not None:
            with release.measure():
                model(x).square().mean().backward()
        model(x).square().mean().backward()
        optimizer.step()

    results = []
    torch._dynamo.reset()
    for run_step in (train, torch.compile(train, backend="eager")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        optimizer = make(model.parameters())
        release = GradientRelease(optimizer, bucket_bytes=0, max_grad_norm=max_norm)
        with release:
            for step in range(4):
                run_step(model, optimizer, release, torch.ones(3, 8) + step)
        assert [optimizer.state[p]["step"] for p in model.parameters()] == [4] * 4
        results.append(list(model.parameters()))
    torch._dynamo.reset()
    assert all(map(torch.equal, *results))


def stored(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("size", [0, 4 * 64 * 64, 4 * 64 * 64 * 3])
def test_live_gradients_are_a_bucket_and_one(size) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(12)])
    params, live = list(model.parameters()), []

    def measure(_) -> None:
        live.append(sum(stored(p.grad) for p in params if p.grad is not None))

    for param in params:
        param.register_post_accumulate_grad_hook(measure)
    optimizer = make(params)
    with GradientRelease(optimizer, bucket_bytes=size):
        model(torch.randn(8, 64)).sum().backward()
        left = [p for p in params if stored(p.grad)]
        optimizer.step()
    assert len(live) == 12
    assert max(live) <= max(size, params[0].nbytes)
    assert not left
    for param in params:  # the whole step has them all
        param.grad = None
    live.clear()
    model(torch.randn(8, 64)).sum().backward()
    assert max(live) == 12 * params[0].nbytes


@pytest.mark.cuda
def test_peak_memory_on_a_gpu_is_less_by_the_gradients() -> None:
    peaks, results = [], []
    for released in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)]).cuda()
        optimizer = make(model.parameters())
        release = GradientRelease(optimizer, bucket_bytes=17 << 20)
        if released:
            release.attach()
        batch = torch.randn(16, 2048, device="cuda")
        for step in range(3):
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
        results.append([p.detach().cpu() for p in model.parameters()])
        release.detach()
        del model, optimizer, release, batch
        gc.collect()
        torch.cuda.empty_cache()
    assert peaks[0] - peaks[1] >= 5 * 2048 * 2048 * 4
    assert all(map(torch.equal, *results))


@pytest.mark.interpret
@pytest.mark.parametrize("backend", ["triton"])
def test_buckets_keep_their_plans(backend, monkeypatch) -> None:
    from optstate_codecs.engine import executor

    built, real = [], executor.build_buckets
    monkeypatch.setattr(executor, "build_buckets", lambda request: built.append(1) or real(request))
    shapes = [(32,)] * (executor.PLANS + 4)
    trainer = Trainer(lambda params: make(params, backend=backend), shapes)
    grads = [torch.ones(32) for _ in shapes]
    whole = Trainer(lambda params: make(params, backend=backend), shapes)
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        for _ in range(3):
            sum((p * g).sum() for p, g in zip(trainer.params, grads, strict=True)).backward()
            trainer.optimizer.step()
    assert len(built) == len(shapes)
    for _ in range(3):
        for param, grad in zip(whole.params, grads, strict=True):
            param.grad = grad.clone()
        whole.optimizer.step()
    assert_same(trainer.tensors(), whole.tensors())
