"""Law 7 for the split-master write: parameter and correction are the reference's, bit for bit."""

import pytest
import torch
from test_split_master import HALVES, SPLITS, every_kind
from test_triton import SHAPES, devices, pair

from optstate_codecs.rounding import Counter
from optstate_codecs.triton_lib import HAS_TRITON, jit, tl
from optstate_codecs.writes import CORRECTION, parameter_write

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")
TILE = 1 << 12

if not HAS_TRITON:
    pytest.skip("needs triton, whose kernels are defined here", allow_module_level=True)


@jit
def store_kernel(
    x, random, param, correction, numel, STORE: tl.constexpr, OPTIONS: tl.constexpr, N: tl.constexpr
):
    offsets = tl.program_id(0) * N + tl.arange(0, N)
    mask = offsets < numel
    value = tl.load(x + offsets, mask=mask, other=0.0)
    bits = tl.load(random + offsets, mask=mask, other=0)
    STORE(param, correction, value, bits, offsets, mask, OPTIONS)


@jit
def load_kernel(
    param, correction, back, numel, LOAD: tl.constexpr, OPTIONS: tl.constexpr, N: tl.constexpr
):
    offsets = tl.program_id(0) * N + tl.arange(0, N)
    mask = offsets < numel
    tl.store(back + offsets, LOAD(param, correction, offsets, mask, OPTIONS), mask=mask)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """As the kernel sees a parameter: bfloat16 as 16-bit integers."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_every_float_splits_and_reads_alike(name, dtype, device) -> None:
    x = every_kind(1 << 16)
    write = parameter_write(name, dtype)
    draw = Counter(0, 1, 0).stream(0)
    correction = torch.zeros(x.shape, dtype=write.components[0].dtype)
    param = write.write(x, [correction], draw)
    back = write.read(param, [correction])

    functions = write.device_functions
    grid = (-(-x.numel() // TILE),)
    got = torch.zeros_like(param, device=device), torch.zeros_like(correction, device=device)
    bits = draw.bits16(x.numel()).to(device)
    options = {"OPTIONS": functions.options, "N": TILE}
    store_kernel[grid](
        x.to(device), bits, raw(got[0]), got[1], x.numel(), STORE=functions.store, **options
    )
    number = ~torch.isnan(x)
    got_param, got_correction = got[0].cpu(), got[1].cpu()
    assert torch.isnan(got_param[~number]).all()
    assert torch.equal(raw(got_param)[number], raw(param)[number])
    assert torch.equal(got_correction, correction)

    # and whatever stands in the correction of a parameter that was set
    stale = torch.roll(correction, 1)
    for kept, expected in ((correction, back), (stale, write.read(param, [stale]))):
        read = torch.zeros_like(x, device=device)
        load_kernel[grid](
            raw(got[0]), kept.to(device), read, x.numel(), LOAD=functions.load, **options
        )
        read = read.cpu()
        assert torch.isnan(read[~number]).all()
        assert torch.equal(read.view(torch.int32)[number], expected.view(torch.int32)[number])


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_a_step_of_decay_alone_is_the_same_to_the_bit(name, dtype, device) -> None:
    """One product, which both sides round alike: what differs would be the write's doing."""
    options = {"write": name, "lr": 0.01, "weight_decay": 0.3}
    reference, kernel = pair(("fp32", "fp32"), device, SHAPES, dtype, **options)
    for _ in range(6):
        for trainer in (reference, kernel):
            for param in trainer.params:
                param.grad = torch.zeros_like(param)
            trainer.optimizer.step()
        for ours, theirs in zip(reference.params, kernel.params, strict=True):
            assert torch.equal(ours, theirs.cpu())
            expected = reference.optimizer.state[ours][CORRECTION]
            assert torch.equal(expected, kernel.optimizer.state[theirs][CORRECTION].cpu())
    assert any(reference.optimizer.state[p][CORRECTION].any() for p in reference.params)
    (plan,) = kernel.optimizer.executor._plans.values()
    assert [len(plan.fallback), sum(len(bucket.param_steps) for bucket in plan.buckets)] == [0, 8]


@pytest.mark.parametrize("device", devices())
def test_writes_do_not_share_a_bucket(device) -> None:
    """Bfloat16 and float32 parameters under one split write: the latter keeps no correction."""
    reference, kernel = pair(("fp32", "fp32"), device, ((64,), (64,)), write="split24")
    for trainer in (reference, kernel):
        trainer.params[0].data = trainer.params[0].data.bfloat16()
        for param in trainer.params:
            param.grad = torch.zeros_like(param)
        trainer.optimizer.step()
    for ours, theirs in zip(reference.params, kernel.params, strict=True):
        assert torch.equal(ours, theirs.cpu())
        assert (CORRECTION in kernel.optimizer.state[theirs]) == (ours.dtype == torch.bfloat16)
    (plan,) = kernel.optimizer.executor._plans.values()
    assert len(plan.buckets) == 2
