"""DTensors on one process: stepped as plain tensors, counted by shard, or refused by name."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import lowbit_adam
import stochbf16
import turboadam
from optstate_codecs import GradientRelease, memory_report, offload, snapshot
from optstate_wrap import ConfigurablePolicy, wrap

FAMILY = [
    *[getattr(lowbit_adam, n) for n in ("Adam8bit", "AdamW8bit", "Adam4bit", "AdamW4bit")],
    *[getattr(lowbit_adam, n) for n in ("AdamFp8", "AdamWFp8", "Lion8bit", "SGD8bit")],
    turboadam.TurboAdam,
    *[getattr(stochbf16, n) for n in ("Adam", "AdamW", "Compass", "LPFAdamW", "Lion", "RMSProp")],
    stochbf16.SGD,
]


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def line():
    return init_device_mesh("cpu", (1,))


def sharded(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    mesh = init_device_mesh("cpu", (1,))
    return Parameter(distribute_tensor(torch.ones(*shape, dtype=dtype), mesh, [Shard(0)]))


@pytest.mark.parametrize("make", FAMILY, ids=lambda make: f"{make.__module__}.{make.__name__}")
def test_they_are_stepped_as_plain_tensors(make) -> None:
    """Rows of 2048 elements hold whole blocks, so codes are those of plain tensors too."""
    ends = []

    def shard(value: torch.Tensor) -> Parameter:
        return Parameter(distribute_tensor(value, line(), [Shard(0)]))

    for build in (make, lambda params: offload(make(params), chunk_bytes=1 << 12)):
        for kind in (Parameter, shard):
            params = [kind(torch.ones(shape)) for shape in ((12, 2048), (8, 4096))]
            optimizer = build(params)
            for step in range(3):
                for number, param in enumerate(params):
                    generator = torch.Generator().manual_seed(10 * step + number)
                    grad = torch.randn(param.shape, generator=generator)
                    plain = not isinstance(param, DTensor)
                    param.grad = grad if plain else distribute_tensor(grad, line(), [Shard(0)])
                optimizer.step()
            with snapshot(optimizer) as taken:
                saved = taken.state_dict()["state"]
            stored = [value for state in saved.values() for value in state.values()]
            ends.append([local(value) for value in (*params, *stored)])
    for other in ends[1:]:
        assert all(map(torch.equal, ends[0], other))


def local(value: torch.Tensor) -> torch.Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach().flatten()


def test_a_compiled_step_is_the_eager_one() -> None:
    ends = []
    for compiled in (False, True):
        param = sharded(12, 2048)
        optimizer = lowbit_adam.AdamW8bit([param], lr=1e-2)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            grad = torch.randn(param.shape, generator=generator)
            param.grad = distribute_tensor(grad, line(), [Shard(0)])
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
            step()
        ends.append(local(param))
    assert torch.equal(*ends)


def test_a_gradient_of_another_kind_is_refused() -> None:
    param = sharded(40, 30)
    optimizer = lowbit_adam.AdamW8bit([param])
    given = {0: torch.ones(40, 30)}
    with pytest.raises(
        TypeError, match=r"gradient of parameter 0: is a plain tensor, must be a DTensor"
    ):
        optimizer._step(given)
    assert torch.equal(param.full_tensor(), torch.ones(40, 30))


def test_state_of_shards_is_refused_for_plain_parameters() -> None:
    param = sharded(12, 2048)
    param.grad = torch.ones_like(param)
    optimizer = lowbit_adam.AdamW8bit([param])
    optimizer.step()
    plain = lowbit_adam.AdamW8bit([Parameter(torch.ones(12, 2048))])
    with pytest.raises(
        TypeError, match=r"\['exp_avg_codes'\]: is a DTensor, must be a plain tensor"
    ):
        plain.load_state_dict(optimizer.state_dict())
    assert not plain.state


def test_whole_rows_are_asked_for_by_centralization() -> None:
    mesh = init_device_mesh("cpu", (1,))
    columns = Parameter(distribute_tensor(torch.ones(40, 30), mesh, [Shard(1)]))
    columns.grad = torch.ones_like(columns)
    lowbit_adam.AdamW8bit([columns], centralization=1.0).step()  # one worker has them


def test_gradient_release_of_a_wrapped_optimizer_takes_them() -> None:
    """But for ``max_grad_norm``, whose norm is that of all shards."""
    results = []
    for released in (True, False):
        param = sharded(40, 30)
        optimizer = wrap(torch.optim.AdamW([param]), ConfigurablePolicy({"exp_avg": "int8"}))
        release = GradientRelease(optimizer, bucket_bytes=0)
        if released:
            release.attach()
        for _ in range(3):
            (param * 3).sum().backward()
            if released:
                with pytest.raises(RuntimeError, match=r"GradientRelease: .*max_grad_norm="):
                    clip_grad_norm_([param], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        results.append(param.full_tensor())
    assert torch.equal(*results)
    with (
        GradientRelease(optimizer, max_grad_norm=1.0) as release,
        release.measure(),
        pytest.raises(RuntimeError, match="max_grad_norm: gradient 0 is a DTensor"),
    ):
        param.sum().backward()


def test_memory_is_counted_by_shard() -> None:
    param = sharded(40, 30)
    param.grad = torch.ones_like(param)
    optimizer = torch.optim.AdamW([param])
    optimizer.step()
    report = memory_report(optimizer)
    assert report.parameters == 1200
    assert (report.parameter_bytes, report.gradient_bytes) == (4800, 4800)
    assert report.state_bytes == 9604


def test_the_accumulator_refuses_them() -> None:
    plain = Parameter(torch.ones(3, dtype=torch.bfloat16))
    accumulator = stochbf16.StochasticAccumulator([plain, sharded(4, 3, dtype=torch.bfloat16)])
    with pytest.raises(TypeError, match=r"params\[1\]: is a DTensor .*reduce_dtype=torch.float32"):
        accumulator.attach()
    for _ in range(300):
        plain.sum().backward()
    assert plain.grad[0] == 256  # by torch, which rounds to nearest: nothing is attached


def test_rounding_refuses_them() -> None:
    target = sharded(4, 3, dtype=torch.bfloat16).detach()
    source = torch.ones(4, 3)
    with pytest.raises(TypeError, match=r"target: is a DTensor .*\.to_local\(\)"):
        stochbf16.stochastic_round_(target, source)
    assert isinstance(target, DTensor)
    with pytest.raises(TypeError, match=r"source: is a DTensor .*\.to_local\(\)"):
        stochbf16.stochastic_round(sharded(4, 3))


@pytest.mark.parametrize("make", [lowbit_adam.AdamW8bit, lowbit_adam.AdamW4bit])
def test_a_replicas_components_are_shown_as_large_as_they_are(make) -> None:
    """Where blocks do not end with rows, there are not as many of them for each row."""
    value = torch.randn(36, 160, generator=torch.Generator().manual_seed(0))
    param, plain = Parameter(distribute_tensor(value, line(), [Replicate()])), Parameter(value)
    optimizers = make([param]), make([plain])
    param.grad = distribute_tensor(torch.ones(36, 160), line(), [Replicate()])
    plain.grad = torch.ones(36, 160)
    for optimizer in optimizers:
        optimizer.step()
    ours, theirs = (optimizer.state_dict()["state"][0] for optimizer in optimizers)
    for component in filter(lambda v: isinstance(v, DTensor), ours.values()):
        assert component.shape == component.to_local().shape
    resumed = make([param])
    resumed.load_state_dict(optimizers[0].state_dict())
    for key, component in ours.items():
        assert torch.equal(
            torch.as_tensor(local(component)),
            torch.as_tensor(local(resumed.state_dict()["state"][0][key])),
        )
    assert theirs.keys() <= ours.keys()


@pytest.mark.filterwarnings("ignore:Profiler record function")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "make",
    [lowbit_adam.AdamW8bit, lambda params, lr: wrap(torch.optim.AdamW(params, lr=lr))],
    ids=["AdamW8bit", "wrapped"],
)
def test_a_compiled_step_is_the_step(make, backend) -> None:
    torch._dynamo.reset()
    params = [sharded(40, 256), sharded(40, 256)]
    optimizers = [make([param], lr=1e-2) for param in params]
    compiled = torch.compile(lambda: optimizers[0].step(), backend=backend)
    for step in range(4):
        grad = torch.randn(40, 256, generator=torch.Generator().manual_seed(step))
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = distribute_tensor(grad, line(), [Shard(0)])
            optimizer.param_groups[0]["lr"] *= 0.5
        before = local(params[0]).clone()
        compiled()
        optimizers[1].step()
        assert torch.equal(local(params[0]), local(params[1]))
        assert not torch.equal(local(params[0]), before)
    torch._dynamo.reset()
