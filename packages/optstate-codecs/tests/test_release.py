"""Gradient release gives the bits of a plain step, frees gradients, and refuses the rest."""

import gc
import weakref
from functools import partial

import pytest
import torch
from subjects import EXACT, FIRST, SECOND, SUBJECTS
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from optstate_codecs import Adam, CodedOptimizer, GradientRelease
from optstate_codecs.testing import SHAPES, Trainer

CODED = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
#: bytes: every parameter alone, some together, all together
BUCKETS = [0, 3000, 1 << 30]

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")


def make(params, formats=CODED, **options):
    return CodedOptimizer(params, Adam(decoupled=True), formats, lr=1e-2, **options)


def backward(trainer: Trainer) -> None:
    """A backward whose gradients are those that the trainer gives, bit by bit."""
    pairs = [(p, trainer.gradient(i)) for i, p in enumerate(trainer.params) if p.requires_grad]
    sum((p * grad).sum() for p, grad in pairs if grad is not None).backward()


def run(trainer: Trainer, steps: int, *, zero: bool = True) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        backward(trainer)
        trainer.optimizer.step()
        if zero:
            trainer.optimizer.zero_grad()
        trainer.time += 1
    return trainer.tensors()


def counts(trainer: Trainer) -> list[int]:
    """How many steps each parameter has taken."""
    return [int(trainer.optimizer.state.get(p, {}).get("step", 0)) for p in trainer.params]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


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
    monkeypatch.setattr("optstate_codecs.engine.session.WORTH_BUILDING", 1000)
    monkeypatch.setattr(
        "optstate_codecs.engine.session.compiled.try_step", lambda job: taken.append(len(job.units))
    )
    trainer = Trainer(make, ((30, 30), (20,), (10, 10)))
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        run(trainer, 1)
    assert taken == [1, 1, 1]


@pytest.mark.parametrize("size", [0, 4 * 64 * 64, 4 * 64 * 64 * 3])
def test_live_gradients_are_a_bucket_and_one(size) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(12)])
    params, live = list(model.parameters()), []

    def measure(_) -> None:
        live.append(sum(p.grad.nbytes for p in params if p.grad is not None))

    for param in params:
        param.register_post_accumulate_grad_hook(measure)
    optimizer = make(params)
    with GradientRelease(optimizer, bucket_bytes=size):
        model(torch.randn(8, 64)).sum().backward()
        left = [p for p in params if p.grad is not None]
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
    from optstate_codecs.engine import session

    built, real = [], session.build_buckets
    monkeypatch.setattr(session, "build_buckets", lambda job: built.append(1) or real(job))
    shapes = [(32,)] * (session.PLANS + 4)
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


# two-phase clipping


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
            assert all(param.grad is None for param in ours.params)
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


# what is refused


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


def test_higher_derivatives_are_refused() -> None:
    trainer = Trainer(make, SHAPES)
    with (
        GradientRelease(trainer.optimizer),
        pytest.warns(UserWarning, match="create_graph"),
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
    monkeypatch.setattr("optstate_codecs.release.capturing", lambda: True)
    trainer = Trainer(make, SHAPES)
    with (
        GradientRelease(trainer.optimizer, bucket_bytes=0),
        pytest.raises(RuntimeError, match="CUDA graph capture: cannot be combined"),
    ):
        backward(trainer)


# what goes wrong


def test_an_error_in_a_step_leaves_all_usable(monkeypatch) -> None:
    trainer, calls = Trainer(make, SHAPES), iter(range(100))
    real = CodedOptimizer._step_part

    def failing(*args) -> None:
        if next(calls) == 2:
            raise OSError("boom")
        real(*args)

    monkeypatch.setattr(CodedOptimizer, "_step_part", failing)
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

    monkeypatch.setattr(CodedOptimizer, "_step_part", kernel)
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
    assert all(param.grad is None for param in trainer.params)
    trainer.optimizer = None
    gc.collect()
    assert alive() is None
    backward(trainer)
    assert trainer.params[0].grad is not None


def test_autograd_grad_steps_nothing() -> None:
    trainer = Trainer(make, SHAPES)
    with GradientRelease(trainer.optimizer, bucket_bytes=0):
        before = trainer.tensors()
        torch.autograd.grad((trainer.params[0] * 2).sum(), trainer.params[0])
        assert_same(trainer.tensors(), before)
