"""Gradient release of wrapped optimizers: the bits of a plain step, counted once."""

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from optstate_codecs import GradientRelease
from optstate_codecs.engine.cpu.choice import choice_of
from optstate_wrap import ConfigurablePolicy, OptimizerWrapper, WarmupPolicy, wrap
from optstate_wrap.state import encoder
from optstate_wrap.step import chunked

#: bytes: every parameter alone, some together, all together
BUCKETS = [0, 3000, 1 << 30]
CODED = {"exp_avg": "int8(rounding=stochastic, units=update)", "exp_avg_sq": "oneq(bits=8)"}


def backward(of) -> None:
    """A backward whose gradients are those that the problem sets, bit by bit."""
    of.set_gradients()
    pairs = [(param, param.grad) for param in of.params]
    for param in of.params:
        param.grad = None
    sum((param * grad).sum() for param, grad in pairs if grad is not None).backward()


def run(of, steps: int, *, zero: bool = True):
    for _ in range(steps):
        backward(of)
        of.optimizer.step()
        if zero:
            of.optimizer.zero_grad()
    return of


@pytest.mark.parametrize("size", BUCKETS)
def test_exact_is_the_unwrapped_optimizer(configuration, size, problem, same) -> None:
    kind, options, _ = configuration
    ours = problem(lambda groups: wrap(kind(groups, lr=1e-2, **options), ConfigurablePolicy({})))
    theirs = problem(lambda groups: kind(groups, lr=1e-2, **options))
    with GradientRelease(ours.optimizer, bucket_bytes=size):
        run(ours, 4, zero=False)
        assert all(param.grad is None for param in ours.params)
    same(ours, run(theirs, 4))
    assert ours.optimizer.engine.encoder.steps == 4


@pytest.mark.parametrize("size", BUCKETS)
@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("warmup", [0, 2])
def test_coded_is_the_plain_step(size, store, fused, warmup, problem, same) -> None:
    """With tensors in parts, and the random numbers of the whole step."""

    def make(groups):
        policy = ConfigurablePolicy(CODED, warmup_steps=warmup)
        return wrap(torch.optim.AdamW(groups), policy, 256, store=store, fused=fused)

    ours, theirs = problem(make), problem(make)
    with GradientRelease(ours.optimizer, bucket_bytes=size):
        run(ours, 5, zero=False)
    same(ours, run(theirs, 5))
    saved, expected = ours.optimizer.packed_state_dict(), theirs.optimizer.packed_state_dict()
    assert_alike(saved, expected)


def assert_alike(ours, theirs) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_alike(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b)
    else:
        assert ours == theirs


def test_compiled_loops_step_a_part_where_they_step_the_whole(problem, monkeypatch) -> None:
    taken = []
    choice_of.cache_clear()
    monkeypatch.setattr(
        "optstate_codecs.engine.cpu.choice.KernelChoice.decide",
        lambda self, elements, total, scalars: taken.append((elements, total)),
    )
    ours = problem(
        lambda g: wrap(torch.optim.AdamW(g), ConfigurablePolicy(CODED)), shapes=[(700,)] * 3
    )
    with GradientRelease(ours.optimizer, bucket_bytes=0):
        run(ours, 3)
    assert set(taken) == {(700, 2100)}


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, in a number, a tensor and a list."""

    def __init__(self, params, **options) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group |= {"k": 0, "t": torch.zeros(()), "seen": []}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["t"] += 1
            group["seen"].append(group["k"])
            for param in group["params"]:
                if param.grad is not None:
                    param -= group["lr"] * group["k"] * group["t"] * param.grad


@pytest.mark.parametrize("size", BUCKETS)
@pytest.mark.parametrize("left", [False, True])
def test_groups_change_once_a_step(size, left, problem, same) -> None:
    """Whether or not something is left for the end."""
    ours = problem(lambda groups: wrap(Counting(groups, lr=1e-2), ConfigurablePolicy({})))
    theirs = problem(lambda groups: Counting(groups, lr=1e-2))
    assert ours.optimizer.findings.chunked
    if left:
        # its hook is gone, so that it waits for step()
        ours.params[2].requires_grad_(False)
    with GradientRelease(ours.optimizer, bucket_bytes=size):
        ours.params[2].requires_grad_(True)
        for number in range(3):
            run(ours, 1, zero=False)
            assert [group["k"] for group in ours.optimizer.param_groups] == [number + 1] * 2
    same(ours, run(theirs, 3))
    ours.optimizer.step()
    theirs.optimizer.step()
    same(ours, theirs)


def test_detached_in_the_middle_a_late_learning_rate_stays(problem) -> None:
    ours = problem(lambda groups: wrap(Counting(groups, lr=1e-2), ConfigurablePolicy({})))
    with GradientRelease(ours.optimizer, bucket_bytes=0):
        backward(ours)
    for group in ours.optimizer.param_groups:
        group["lr"] = 7.0
    ours.optimizer.step()
    assert [(g["lr"], g["k"]) for g in ours.optimizer.param_groups] == [(7.0, 1)] * 2
    assert ours.optimizer.engine.encoder.steps == 1


def test_schedules_hooks_and_warmup_count_steps(problem, same) -> None:
    results = []
    for released in (True, False):
        seen = []
        of = problem(lambda g: OptimizerWrapper(torch.optim.AdamW(g), WarmupPolicy(2)))
        of.optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append(1))
        scheduler = torch.optim.lr_scheduler.LambdaLR(of.optimizer, lambda n: 0.5**n)
        release = GradientRelease(of.optimizer, bucket_bytes=3000)
        if released:
            release.attach()
        for number in range(4):
            assert of.optimizer.compression_active == (number >= 2)
            run(of, 1)
            scheduler.step()
        assert len(seen) == 4
        results.append(of)
    same(*results)


@pytest.mark.parametrize("size", BUCKETS)
@pytest.mark.parametrize("codecs", [{}, CODED], ids=["exact", "coded"])
def test_clipping_is_that_of_torch(size, codecs, problem, same) -> None:
    def make(groups):
        return wrap(torch.optim.AdamW(groups), ConfigurablePolicy(codecs), 256)

    ours, theirs = problem(make), problem(make)
    with GradientRelease(ours.optimizer, bucket_bytes=size, max_grad_norm=0.7) as release:
        for _ in range(3):
            with release.measure():
                backward(ours)
            ours.step -= 1
            run(ours, 1, zero=False)
            backward(theirs)
            assert torch.equal(release.grad_norm, clip_grad_norm_(theirs.params, 0.7))
            theirs.optimizer.step()
            theirs.optimizer.zero_grad()
    same(ours, theirs)


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("codecs", [{}, CODED], ids=["exact", "coded"])
def test_clipping_after_backward_is_noticed(codecs, store, problem, same) -> None:
    def make(groups):
        return wrap(torch.optim.AdamW(groups), ConfigurablePolicy(codecs), 256, store=store)

    ours, theirs = problem(make), problem(make)
    with GradientRelease(ours.optimizer, bucket_bytes=0):
        for _ in range(3):
            backward(ours)
            with pytest.raises(RuntimeError, match=r"GradientRelease: .* max_grad_norm="):
                clip_grad_norm_(ours.params, 0.7)
            assert ours.optimizer.memory_report().gradient_bytes == 0
            ours.optimizer.step()
            assert all(param.grad is None for param in ours.params)
    same(ours, run(theirs, 3))


def test_what_cannot_be_stepped_in_parts_is_refused() -> None:
    params = [Parameter(torch.ones(3))]
    with pytest.warns(UserWarning, match="cannot be stepped in chunks"):
        whole = wrap(torch.optim.LBFGS(params))
    with pytest.raises(ValueError, match="optimizer=LBFGS: cannot be stepped in chunks"):
        GradientRelease(whole)
    plain = wrap(torch.optim.AdamW(params))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with GradientRelease(plain, bucket_bytes=0):
        scaler.scale((params[0] * 2).sum()).backward()
        with pytest.raises(RuntimeError, match="GradScaler: cannot be combined"):
            scaler.step(plain)
        with pytest.raises(ValueError, match="closure: must be None"):
            plain.step(lambda: 0.0)
    assert not plain._step_supports_amp_scaling


@pytest.mark.parametrize(
    ("module", "phase"),
    [(chunked, "decode_state"), (chunked, "unhooked_step"), (encoder, "encode_state")],
    ids=["decode", "step", "encode"],
)
def test_an_error_in_a_part_leaves_all_usable(module, phase, problem, monkeypatch) -> None:
    ours = problem(
        lambda g: wrap(torch.optim.AdamW(g), ConfigurablePolicy(CODED), fused=False),
        shapes=[(300,)] * 5,
    )
    run(ours, 1)
    ours.step = 0
    calls, real = iter(range(100)), getattr(module, phase)
    before = [param.detach().clone() for param in ours.params]

    def failing(*args, **kwargs):
        if next(calls) == 2:
            raise OSError("boom")
        return real(*args, **kwargs)

    with GradientRelease(ours.optimizer, bucket_bytes=0):
        with monkeypatch.context() as patch:
            patch.setattr(module, phase, failing)
            with pytest.raises(RuntimeError, match="boom") as caught:
                backward(ours)
        changed = [
            number
            for number, (was, param) in enumerate(zip(before, ours.params, strict=True))
            if not torch.equal(was, param)
        ]
        assert len(changed) == 2
        assert f"parameters {changed} had been stepped" in str(caught.value)
        assert ours.optimizer.engine.encoder.steps == 1
        ours.optimizer.zero_grad()
        run(ours, 1)
    assert ours.optimizer.engine.encoder.steps == 2


@pytest.mark.cuda
@pytest.mark.parametrize("codecs", [{}, CODED], ids=["exact", "coded"])
def test_on_a_gpu_bits_are_the_same_and_memory_is_less(codecs) -> None:
    peaks, results = [], []
    for released in (False, True):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(2048, 2048) for _ in range(8)]
        model = torch.nn.Sequential(*layers).cuda()
        optimizer = wrap(torch.optim.AdamW(model.parameters()), ConfigurablePolicy(codecs), 1 << 22)
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
        results.append([param.detach().cpu() for param in model.parameters()])
        release.detach()
        del model, layers, optimizer, release, batch
        torch.cuda.empty_cache()
    assert peaks[0] - peaks[1] >= 4 * 2048 * 2048 * 4
    assert all(map(torch.equal, *results))
