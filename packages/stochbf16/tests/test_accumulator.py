"""What the accumulator adds, and how: gradients add up without bias, in shared launches."""

from collections.abc import Callable

import numpy
import pytest
import torch
from micro_batches import BF16, a_param, devices, give, values
from torch import Tensor, nn

from optstate_codecs.rounding import Draw, stochastic_round_bf16
from optstate_codecs.stochastic import STREAM
from stochbf16 import StochasticAccumulator, accumulator
from stochbf16 import pending as pending_module


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


def test_two_additions_to_one_sum_never_share_a_launch(launches: list[int]) -> None:
    param = a_param(4)
    param.grad = total = torch.ones(4, dtype=BF16)
    pending = pending_module.Pending(total.device)
    for count in (1, 2):
        new = torch.full((4,), 2.0, dtype=BF16)
        pending.append(pending_module.Addition(param, 0, count, total, new, total._version), 0)
    pending.add(0)
    assert launches == [1, 1]
    assert values(param) == [5.0]


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


# torch warns once in a process
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_graphs_of_gradients_are_torchs(launches: list[int]) -> None:
    param = a_param(4, dtype=BF16)
    with StochasticAccumulator([param]):
        give((param, 1.0))
        (param * param * 0 + param).sum().backward(create_graph=True)
        assert param.grad is not None
        assert param.grad.requires_grad
        assert values(param) == [2.0]
        param.grad = None
    assert not launches


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
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
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


def test_numpy_numbers_are_kept_and_saved_as_plain_ones() -> None:
    seed, size = numpy.uint32(3), numpy.int64(1 << 20)
    accumulator = StochasticAccumulator([a_param(1)], rounding_seed=seed, bucket_bytes=size)
    assert type(accumulator.state_dict()["rounding_seed"]) is int
    accumulator.load_state_dict({"rounding_seed": numpy.int64(5), "additions": numpy.array([7])})
    saved = accumulator.state_dict()
    assert saved == {"rounding_seed": 5, "additions": [7]}
    assert [type(saved["rounding_seed"]), *map(type, saved["additions"])] == [int, int]
    with pytest.raises(TypeError, match=r"rounding_seed=.*: must be an int, got float64"):
        StochasticAccumulator([a_param(1)], rounding_seed=numpy.float64(1))
