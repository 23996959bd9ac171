"""Gradients add up without bias, and whatever happens between micro-batches, none is counted twice.

Gradients are chosen so that bfloat16 holds their sums, where a test is about which are summed;
they are random where it is about how.
"""

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optstate_codecs.rounding import Draw, stochastic_round_bf16
from optstate_codecs.stochastic import STREAM
from stochbf16 import StochasticAccumulator, accumulator
from stochbf16 import pending as pending_module

BF16 = torch.bfloat16


def a_param(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))


def give(*pairs: tuple[Tensor, float | Tensor], **options) -> None:
    """One backward that brings each parameter this gradient."""
    total = sum((p * g).sum().to(p.device, torch.float32) for p, g in pairs)
    assert isinstance(total, Tensor)
    total.backward(**options)


class Bad(torch.autograd.Function):
    """Raises in the backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


def interrupted(good: Tensor, bad: Tensor, value: float = 1.0) -> None:
    """A backward that brings ``good`` its gradient, and then fails on its way to ``bad``."""
    late = Bad.apply(bad).sum()  # what was made first comes last
    with pytest.raises(ArithmeticError, match="on purpose"):
        (late + (good * value).sum()).backward()


def values(*params: Tensor) -> list[float | None]:
    return [None if p.grad is None else float(p.grad.detach().double().mean()) for p in params]


def devices() -> list:
    interpreter = pytest.param("cpu", marks=pytest.mark.interpret, id="interpreter")
    cuda = pytest.param("cuda", marks=pytest.mark.cuda, id="cuda")
    return [pytest.param("cpu", id="cpu"), interpreter, cuda]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients each launch added."""
    counts: list[int] = []
    original = pending_module.round_

    def counting(targets, *args, **options) -> None:
        counts.append(len(targets))
        original(targets, *args, **options)

    monkeypatch.setattr(pending_module, "round_", counting)
    return counts


@pytest.mark.parametrize("device", devices())
def test_additions_draw_from_seed_count_and_place(device: str) -> None:
    params = [a_param(61, 83, device=device), a_param(device=device), a_param(0, 3, device=device)]
    generator = torch.Generator().manual_seed(0)
    sums = [torch.zeros(p.shape) for p in params]
    with StochasticAccumulator(params, rounding_seed=9):
        for batch in range(5):
            grads = [torch.randn(p.shape, generator=generator).to(BF16) for p in params]
            give(*[(p, g.to(device)) for p, g in zip(params, grads, strict=True)])
            for place, grad in enumerate(grads):
                bits = Draw(9, batch, place, STREAM).bits16(grad.numel()).view(grad.shape)
                sums[place] = stochastic_round_bf16(sums[place] + grad.float(), bits).float()
    for param, expected in zip(params, sums, strict=True):
        assert param.grad is not None
        assert param.grad.dtype == BF16
        assert torch.equal(param.grad.float().cpu(), expected)


def test_512_micro_batches_have_no_bias() -> None:
    param, plain = a_param(64, 64), a_param(64, 64)
    generator = torch.Generator().manual_seed(0)
    exact = torch.zeros(64, 64, dtype=torch.float64)
    with StochasticAccumulator([param]):
        for _ in range(512):
            grad = (0.8 + 0.05 * torch.randn(64, 64, generator=generator)).to(BF16)
            exact += grad.double()
            give((param, grad), (plain, grad))
    assert param.grad is not None
    assert plain.grad is not None
    bias = float((param.grad.double() - exact).mean() / exact.mean())
    nearest = float((plain.grad.double() - exact).mean() / exact.mean())
    assert abs(bias) < 1e-3
    assert nearest < -0.3
    error = float((param.grad.double() - exact).norm() / exact.norm())
    assert error < 0.05 < 0.3 < float((plain.grad.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("limit", [0, 100, 1 << 20])
def test_one_launch_for_what_fits_the_bucket(limit: int, launches: list[int]) -> None:
    params = [a_param(16) for _ in range(8)]
    with StochasticAccumulator(params, bucket_bytes=limit):
        for _ in range(3):
            give(*[(p, 1.0) for p in params])
    # the first micro-batch has nothing to add to; a gradient has 32 bytes
    each = {0: [1] * 8, 100: [4, 4], 1 << 20: [8]}[limit]
    assert launches == each * 2
    assert values(*params) == [3.0] * 8


def test_sums_stay_where_they_are_and_new_gradients_are_not_copied() -> None:
    param = a_param(16)
    made, kept = [], []

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            out = grad * 2
            made.append(out.data_ptr())
            return out

    def noting(addition, *_) -> None:
        kept.append(addition.new.data_ptr())

    with pytest.MonkeyPatch.context() as patch, StochasticAccumulator([param]):
        original = pending_module.Pending.append
        patch.setattr(
            pending_module.Pending, "append", lambda s, a, seed: (noting(a), original(s, a, seed))
        )
        Note.apply(param).sum().backward()
        total = param.grad
        Note.apply(param).sum().backward()
    assert param.grad is total
    assert kept == made[1:]
    assert values(param) == [4.0]


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_begins_anew(to_none: bool) -> None:
    model = nn.Linear(3, 2, bias=False, dtype=BF16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StochasticAccumulator(model):
        for _ in range(2):
            for _ in range(3):
                give((model.weight, 1.0))
            assert values(model.weight) == [3.0]
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        give((model.weight, 1.0))
    assert values(model.weight) == [1.0]


def test_clipping_between_and_after() -> None:
    param = a_param(16)
    with StochasticAccumulator([param]):
        give((param, 4.0))
        nn.utils.clip_grad_norm_([param], 8.0)  # the norm was 16
        give((param, 1.0))
        assert param.grad is not None
        assert float(param.grad.float().mean()) == pytest.approx(3.0, rel=2**-7)
        norm = nn.utils.clip_grad_norm_([param], 1.0)
        assert float(norm) == pytest.approx(12.0, rel=2**-6)
        assert float(param.grad.float().norm()) == pytest.approx(1.0, rel=2**-6)


def test_parameters_that_get_no_gradient_keep_what_they_have() -> None:
    first, second, third = a_param(4), a_param(4), a_param(4)
    with StochasticAccumulator([first, second, third]):
        give((first, 1.0), (second, 2.0))
        give((first, 1.0))
        give((second, 2.0), (first, 1.0))
        assert values(first, second, third) == [3.0, 4.0, None]


class OnlyFirst(torch.autograd.Function):
    """Tells autograd that the second input has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_gradients_that_a_function_leaves_out() -> None:
    first, second = a_param(4), a_param(4)
    with StochasticAccumulator([first, second]):
        give((first, 1.0), (second, 2.0))
        OnlyFirst.apply(first, second).sum().backward()
    assert values(first, second) == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_torchs(dtype: torch.dtype, launches: list[int]) -> None:
    param, other = a_param(16), a_param(16, dtype=dtype)
    with StochasticAccumulator([other, param]):
        for _ in range(3):
            give((param, 1.0), (other, 1 / 3))
    assert launches == [1, 1]
    third = torch.tensor(1 / 3, dtype=dtype)
    assert other.grad is not None
    assert torch.equal(other.grad, (third + third + third).expand(16))


def test_a_model_that_changes_its_dtype_while_attached() -> None:
    model = nn.Linear(4, 2, bias=False)
    with StochasticAccumulator(model):
        give((model.weight, 1.0))
        model.to(BF16)
        give((model.weight, 1.0))
        give((model.weight, 1.0))
        assert model.weight.grad is not None
        assert model.weight.grad.dtype == BF16
        assert values(model.weight) == [3.0]


def test_sparse_gradients_are_torchs() -> None:
    table = nn.Embedding(6, 4, sparse=True, dtype=BF16)
    table.weight.grad = torch.ones(6, 4, dtype=BF16)
    with StochasticAccumulator(table):
        for _ in range(2):
            table(torch.tensor([0, 2])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [3, 1, 3, 1, 1, 1]


def test_layouts_of_their_own() -> None:
    conv = nn.Conv2d(3, 5, 3, bias=False, dtype=BF16).to(memory_format=torch.channels_last)
    conv.weight.grad = torch.ones(5, 3, 3, 3, dtype=BF16)  # laid out unlike its parameter
    with StochasticAccumulator(conv):
        for _ in range(2):
            give((conv.weight, 1.0))
    assert values(conv.weight) == [3.0]


def test_graphs_of_gradients_are_torchs(launches: list[int]) -> None:
    param = a_param(4, dtype=BF16)
    with StochasticAccumulator([param]):
        give((param, 1.0))
        with pytest.warns(UserWarning, match="create_graph=True"):
            (param * param * 0 + param).sum().backward(create_graph=True)
        assert param.grad is not None
        assert param.grad.requires_grad
        assert values(param) == [2.0]
        param.grad = None
    assert not launches


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
        optimizer = torch.optim.SGD([good, bad], lr=1.0)
        optimizer.zero_grad(set_to_none=how == "none")
        if how == "replace":
            good.grad, bad.grad = torch.zeros(4, dtype=BF16), None
        give((good, 1.0), (bad, 1.0))
        give((good, 1.0), (bad, 1.0))
        assert values(good, bad) == [2.0, 2.0]


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


def random_batches(param: Tensor, seeds: range) -> None:
    for seed in seeds:
        give((param, torch.randn(500, generator=torch.Generator().manual_seed(seed)).to(BF16)))


def test_a_resumed_run_draws_what_it_would_have() -> None:
    whole, half = a_param(500), a_param(500)
    with StochasticAccumulator([whole], rounding_seed=3):
        random_batches(whole, range(8))
    first = StochasticAccumulator([half], rounding_seed=3)
    with first:
        random_batches(half, range(4))
    resumed = a_param(500)
    resumed.grad = half.grad
    second = StochasticAccumulator([resumed])
    second.load_state_dict(first.state_dict())
    with second:
        random_batches(resumed, range(4, 8))
    assert whole.grad is not None
    assert resumed.grad is not None
    assert torch.equal(whole.grad, resumed.grad)
    assert second.state_dict() == {"rounding_seed": 3, "additions": [7]}


def test_seeds_differ_and_additions_draw_anew() -> None:
    one, other = a_param(500), a_param(500)
    with StochasticAccumulator([one]), StochasticAccumulator([other], rounding_seed=1):
        for param in (one, other):
            random_batches(param, range(3))
    assert one.grad is not None
    assert other.grad is not None
    assert not torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: StochasticAccumulator([], bucket_bytes=-1), ValueError, "bucket_bytes=-1"),
        (lambda: StochasticAccumulator([], rounding_seed=0.5), TypeError, "rounding_seed=0.5"),
        (lambda: StochasticAccumulator(a_param(4)), TypeError, "params: must be a module"),
        (lambda: StochasticAccumulator([3]), TypeError, r"params\[0\]: must be a tensor, got int"),
        (lambda: StochasticAccumulator([a_param(4) * 2]), ValueError, r"params\[0\]: .* a leaf"),
        (
            lambda: StochasticAccumulator([a_param(1)]).load_state_dict({"additions": []}),
            KeyError,
            "must have 'rounding_seed' and 'additions'",
        ),
        (
            lambda: StochasticAccumulator([a_param(1)]).load_state_dict(
                {"additions": [], "rounding_seed": 0}
            ),
            ValueError,
            "additions: must be 1, one a parameter, got 0",
        ),
    ],
)
def test_says_what_is_wrong(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_refuses_to_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    param = a_param(4)
    with StochasticAccumulator([param]):
        monkeypatch.setattr(accumulator, "capturing", lambda: True)
        give((param, 1.0))
        with pytest.raises(RuntimeError, match="StochasticAccumulator would repeat its random"):
            give((param, 1.0))
        assert values(param) == [1.0]


@pytest.mark.cuda
def test_backwards_on_streams_of_their_own() -> None:
    params = [a_param(1 << 20, device="cuda") for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    with StochasticAccumulator(params):
        for batch in range(30):
            here = torch.cuda.current_stream()
            losses = []
            for place, param in enumerate(params):
                stream = streams[(place + batch) % 3]
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    losses.append((param * 2).sum())
                here.wait_stream(stream)
            torch.stack(losses).sum().backward()
    assert values(*params) == [60.0] * 4
    for param in params:
        assert param.grad is not None
        assert (param.grad == 60).all()


@pytest.mark.cuda
def test_waiting_gradients_take_no_more_than_a_bucket() -> None:
    params = [a_param(1 << 20, device="cuda") for _ in range(16)]
    limit = 8 * 2**20
    peaks = []
    for attached in (None, StochasticAccumulator(params, bucket_bytes=limit).attach()):
        for _ in range(3):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            give(*[(p, 1.0) for p in params])
        peaks.append(torch.cuda.max_memory_allocated() - before)
        for param in params:
            param.grad = None
        if attached:
            attached.detach()
    assert peaks[1] <= peaks[0] + limit + 2**20
