"""DTensors, as FSDP2 and tensor parallelism make them: refused by name, and counted by shard."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
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
INSTEAD = r"is a DTensor with placements \(S.*0.*\), .* optstate_wrap\.wrap\(torch\.optim\.AdamW"


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    mesh = init_device_mesh("cpu", (1,))
    return Parameter(distribute_tensor(torch.ones(*shape, dtype=dtype), mesh, [Shard(0)]))


def swapped(make, *shape: int) -> tuple[list[Parameter], torch.optim.Optimizer]:
    """An optimizer of plain parameters with state, one of which has become a DTensor since."""
    params = [Parameter(torch.ones(40, 30)), Parameter(torch.ones(*shape))]
    optimizer = make(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    other = sharded(*shape)
    other.grad = torch.ones_like(other)
    optimizer.param_groups[0]["params"][1] = other
    return [*params, other], optimizer


def copies(params, optimizer) -> list[torch.Tensor]:
    states = [dict(optimizer.state.get(param, {})) for param in params]
    return [t.detach().clone() for t in [*params, *(v for s in states for v in s.values())]]


@pytest.mark.parametrize("make", FAMILY, ids=lambda make: f"{make.__module__}.{make.__name__}")
def test_the_family_refuses_them_and_names_what_takes_them(make) -> None:
    with pytest.raises(TypeError, match=rf"params\[1\]: {INSTEAD}"):
        make([Parameter(torch.ones(3)), sharded(40, 30)])
    for build in (make, lambda params: offload(make(params))):
        params, optimizer = swapped(build, 40, 30)
        before = copies(params, optimizer)
        with pytest.raises(TypeError, match=f"parameter 1: {INSTEAD}"):
            optimizer.step()
        after = copies(params, optimizer)
        assert len(after) == len(before)
        assert all(map(torch.equal, after[:2], before[:2]))
        assert all(map(torch.equal, after[3:], before[3:]))
        assert torch.equal(after[2].full_tensor(), before[2].full_tensor())


def test_large_ones_are_refused_before_their_memory_is_read() -> None:
    """From 2^20 elements on, compiled loops read and write what lies at an address."""
    params, optimizer = swapped(partial(lowbit_adam.AdamW8bit, backend="eager"), 1024, 1025)
    optimizer.executor = type(optimizer.executor)("auto")
    with pytest.raises(TypeError, match=f"parameter 1: {INSTEAD}"):
        optimizer.step()
    assert torch.equal(params[2].full_tensor(), torch.ones(1024, 1025))


def test_what_works_on_an_optimizer_refuses_them() -> None:
    _, optimizer = swapped(lowbit_adam.AdamW8bit, 40, 30)
    for refuses in (offload, snapshot, GradientRelease):
        with pytest.raises(TypeError, match=f"parameter 1: {INSTEAD}"):
            refuses(optimizer)
    assert optimizer.offloaded is None


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
