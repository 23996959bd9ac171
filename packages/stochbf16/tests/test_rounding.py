"""The public rounding functions; ``optstate_codecs`` tests what they round with."""

import pytest
import torch

from stochbf16 import stochastic_round, stochastic_round_


def devices() -> list:
    interpreter = pytest.param("cpu", marks=pytest.mark.interpret, id="interpreter")
    cuda = pytest.param("cuda", marks=pytest.mark.cuda, id="cuda")
    return [pytest.param("cpu", id="cpu"), interpreter, cuda]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_goes_to_one_of_two_neighbours(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(3000, generator=seeded()).to(device, dtype)
    got = stochastic_round(x, generator=seeded()).double()
    below = (x.float().view(torch.int32) & -65536).view(torch.float32).double()
    above = ((x.float().view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    assert ((got == below) | ((got == above) & (x.double() != below))).all()
    assert (got != below).any()
    assert (got != above).any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_mean_of_many_draws_is_exact(device: str) -> None:
    x = torch.randn(32, generator=seeded()).to(device)
    generator = seeded(1)
    total = torch.zeros(32, dtype=torch.float64, device=device)
    for _ in range(100):
        total += stochastic_round(x.repeat(1000, 1), generator=generator).double().sum(0)
    error = (total / 1e5 - x.double()) / x.double()
    assert float(error.abs().max()) < 3e-5


@pytest.mark.parametrize("device", devices())
def test_representable_values_are_exact(device: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    got = stochastic_round(every.float().to(device)).cpu()
    number = ~torch.isnan(every)
    assert torch.equal(got.view(torch.int16)[number], bits[number])
    assert torch.isnan(got[~number]).all()


@pytest.mark.parametrize("device", devices())
def test_small_steps_add_up(device: str) -> None:
    """1.0 minus 100 x 1e-3, which nearest rounding would leave at 1.0."""
    x = torch.ones(5000, dtype=torch.bfloat16, device=device)
    generator = seeded()
    for _ in range(100):
        assert stochastic_round_(x, x.float() - 1e-3, generator=generator) is x
    assert abs(float(x.double().mean()) - 0.9) < 0.002


def test_default_generator_makes_it_reproducible_and_moves_on() -> None:
    x = torch.randn(100, generator=seeded())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, second = stochastic_round(x), stochastic_round(x)
        torch.manual_seed(5)
        again = stochastic_round(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(stochastic_round(x, generator=seeded(5)), first)


@pytest.mark.cuda
def test_same_bits_on_the_gpu() -> None:
    x = torch.randn(5000, generator=seeded())
    there = stochastic_round(x.cuda(), generator=seeded())
    assert torch.equal(there.cpu(), stochastic_round(x, generator=seeded()))


def test_result_has_the_layout_of_its_source_and_no_graph() -> None:
    source = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    got = stochastic_round(source.requires_grad_())
    assert got.stride() == source.stride()
    assert not got.requires_grad
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    assert stochastic_round_(parameter, torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    assert parameter.is_leaf
    assert stochastic_round(torch.zeros(0, 3)).shape == (0, 3)
    assert stochastic_round(torch.tensor(0.5)).item() == 0.5


BF16 = torch.zeros(3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("target", "source", "error", "text"),
    [
        (torch.zeros(3), torch.zeros(3), TypeError, "target: must be torch.bfloat16"),
        ([0.0], torch.zeros(3), TypeError, "target: must be a tensor, got list"),
        (BF16, 1.0, TypeError, "source: must be a tensor, got float"),
        (BF16, torch.zeros(3).double(), TypeError, "got torch.float64"),
        (BF16, torch.zeros(3).to_sparse(), TypeError, "got torch.float32, torch.sparse_coo"),
        (BF16, torch.zeros(1), ValueError, r"source: must have the shape of target.*\(1,\)"),
        (BF16, torch.zeros(3, device="meta"), ValueError, "source: must be on the device"),
    ],
)
def test_says_what_is_wrong(target, source, error, text) -> None:
    with pytest.raises(error, match=text):
        stochastic_round_(target, source)
    assert not BF16.any()


def test_refuses_to_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stochbf16.rounding.capturing", lambda: True)
    with pytest.raises(RuntimeError, match="would repeat its random bits"):
        stochastic_round(torch.zeros(3))


@pytest.mark.cuda
def test_refuses_to_be_captured() -> None:
    x = torch.zeros(3, device="cuda")
    target = torch.zeros(3, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="would repeat its random bits"),
        torch.cuda.graph(graph),
    ):
        stochastic_round_(target, x.add_(1))


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rounds_twice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight = torch.ones_like(x, dtype=torch.bfloat16)
    stochastic_round_(weight, weight.float() - 1e-3 * x.detach())
    return stochastic_round(x), stochastic_round(x), weight


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_it_is_one_graph_and_gives_the_same_bits(layout, backend) -> None:
    """Draws included: a compiler must not take two for one, nor one of its own."""
    compiled = torch.compile(rounds_twice, fullgraph=True, backend=backend)
    x = torch.randn(4, 3, 5, 6, generator=seeded()).to(memory_format=layout).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        ours = [*compiled(x), *compiled(x)]
        after = torch.rand(())
        torch.manual_seed(5)
        theirs = [*rounds_twice(x), *rounds_twice(x)]
        assert torch.equal(after, torch.rand(()))
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours[0], ours[1])
    assert not any(t.requires_grad for t in ours)
    assert ours[0].stride() == x.stride()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_it_changes_what_is_outside_the_graph() -> None:
    ours = torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
    theirs = torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
    step = torch.compile(
        lambda: stochastic_round_(ours, ours.float() - 1e-3), fullgraph=True, backend="aot_eager"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for _ in range(20):
            step()
        torch.manual_seed(5)
        for _ in range(20):
            stochastic_round_(theirs, theirs.float() - 1e-3)
    assert torch.equal(ours, theirs)
    assert ours.is_leaf
    assert (ours != 1).any()


@pytest.mark.usefixtures("_fresh_compiler")
# torch has a generator break the graph, whatever takes it
@pytest.mark.filterwarnings("ignore:Graph break")
def test_compiled_with_a_generator_the_graph_breaks() -> None:
    generator, x = seeded(), torch.randn(300, generator=seeded(1))
    compiled = torch.compile(
        lambda x: stochastic_round(x * 2, generator=generator) + 1, backend="eager"
    )
    got = [compiled(x), compiled(x)]
    generator = seeded()
    expected = [stochastic_round(x * 2, generator=generator) + 1 for _ in range(2)]
    assert all(map(torch.equal, got, expected))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_it_says_what_is_wrong() -> None:
    compiled = torch.compile(stochastic_round_, fullgraph=True, backend="eager")
    with pytest.raises(TypeError, match=r"target: must be torch\.bfloat16"):
        compiled(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="source: must have the shape of target"):
        compiled(BF16.clone(), torch.zeros(1))
    assert torch.is_grad_enabled()
