"""Law 7: the kernel gives the reference's bits, in the interpreter and on a GPU.

Both sides take each step from the same state, so that one different rounding is counted once.
"""

from functools import partial

import pytest
import torch
import twins
from subjects import FIRST, SECOND

from optstate_codecs import (
    FP8,
    Adam,
    CodedOptimizer,
    CoState,
    Int4,
    Minifloat,
    OneQ,
    master_weights,
)
from optstate_codecs.engine.triton.buckets import build_buckets
from optstate_codecs.rules import SGD, Compass, Lion, LPFAdamW, RMSProp
from optstate_codecs.testing import Trainer
from optstate_codecs.triton_lib import HAS_TRITON, INTERPRETED
from optstate_codecs.writes import CORRECTION

FORMATS = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "bf16-nearest": ("bf16(rounding=nearest)", "bf16(rounding=nearest)"),
    "fp16": ("fp16(block_size=64)", "bf16"),
    "int8": ("int8", "fp32"),
    "int8-stochastic": ("int8(rounding=stochastic, units=update)", "bf16"),
    "dynamic8": (FIRST, SECOND),
    "dynamic8-plain": ("dynamic8(block_size=64)", "dynamic8(block_size=64, signed=False)"),
    "dynamic8-2048": ("dynamic8", "dynamic8(signed=False, domain=sqrt)"),
    "fp8": (FP8.first_moment(256).spec, Minifloat.second_moment8(256).spec),
    "fp8-plain": ("fp8(block_size=64)", "fp8(block_size=64, signed=False)"),
    "4bit": (Int4.first_moment().spec, Minifloat.second_moment4().spec),
    "turbo": (CoState(4).spec, OneQ(3).spec),
    "turbo-small": (CoState(2).spec, OneQ(3).spec),
    "turbo-sign": (CoState(1).spec, OneQ(2).spec),
    "turbo-wide": (CoState(6).spec, OneQ(6).spec),
    "turbo-cut": (CoState(3, 64, 0.8, 0.1).spec, OneQ(4, 64).spec),
    "flush-1": (CoState(1, 64, levels="normal").spec, OneQ(3, 64).spec),
    "flush-2": (CoState(2, 64, levels="normal").spec, OneQ(3, 64).spec),
    "flush-3": (CoState(3, 128, levels="normal").spec, OneQ(4).spec),
    "flush-4": (CoState(4, 32, levels="normal").spec, OneQ(3, 32).spec),
    "turbo-8": (CoState(3).spec, OneQ(8).spec),
    "4bit-plain": (
        "minifloat(exponent_bits=1, block_size=64, signed=True)",
        "minifloat(exponent_bits=3, mantissa_bits=1, block_size=64)",
    ),
}
# several tiles, tails of every kind, aligned and not, one element, none, no dimensions
SHAPES = ((96, 128), (61, 83), (4097,), (129,), (16,), (1,), (0,), ())
# fewer tiles where tails are not the point: the interpreter takes long for each
FEW = ((16, 128), (11, 83), (129,), ())


def devices() -> list:
    interpreter = pytest.param("cpu", marks=pytest.mark.interpret, id="interpreter")
    return [interpreter, pytest.param("cuda", marks=pytest.mark.cuda, id="cuda")]


pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")


def pair(formats: tuple[str, str], device: str, shapes=SHAPES, dtype=torch.float32, **options):
    """The reference on the CPU and the kernel on ``device``, over equal parameters."""
    return twins.pair("triton", (*formats, "bf16"), shapes, dtype, device, **options)


def compare(reference: Trainer, kernel: Trainer) -> tuple[int, int]:
    """Elements and differing codes; asserts that none differs by more than a level."""
    total = different = 0
    for ours, theirs in zip(reference.params, kernel.params, strict=True):
        state = kernel.optimizer.state.get(theirs, {})
        for key, expected in reference.optimizer.state.get(ours, {}).items():
            got = state[key].cpu()
            if key.endswith("_scale"):
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
                continue
            if key == CORRECTION:
                # an ulp of the update is many levels of 32 bits: what both make is compared
                master = master_weights(kernel.optimizer, theirs).cpu()
                level = 2.0**-14 if expected.dtype == torch.int8 else 2e-6
                exact = master_weights(reference.optimizer, ours)
                torch.testing.assert_close(master, exact, rtol=level, atol=1e-8, equal_nan=True)
                continue
            total += expected.numel()
            wrong = ~torch.isclose(got, expected, rtol=0, atol=0, equal_nan=True)
            different += int(wrong.sum())
            if not expected.is_floating_point():
                assert ((got.int() - expected.int())[wrong].abs() <= 1).all()
            else:
                torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-30, equal_nan=True)
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-2, atol=2e-6, equal_nan=True)
    return total, different


run = partial(twins.run, compare)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_same_codes_for_every_format(formats, device) -> None:
    run(*pair(formats, device))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", ["turbo", "turbo-sign", "flush-2", "bf16", "fp32"])
def test_what_rounding_leaves_out_is_delivered_alike(name, device) -> None:
    rule = Adam(decoupled=True, error_feedback=True)
    reference, kernel = pair(FORMATS[name], device, FEW, rule=rule)
    run(reference, kernel)
    # by the kernel: the reference cannot be captured
    assert all(not plan.fallback for plan in kernel.optimizer.executor._plans.values())


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"write": "stochastic"}),
        (torch.bfloat16, {"write": "split24"}),
        (torch.bfloat16, {"write": "split32"}),
        (torch.float16, {"lr": 0.05}),
        (torch.float16, {"write": "split24"}),
        (torch.float16, {"write": "split32"}),
        (torch.float32, {"amsgrad": True}),
        (torch.float32, {"maximize": True, "betas": (0.4, 0.95)}),
        (torch.float32, {"decoupled": False, "weight_decay": 0.3}),
    ],
    ids=[
        "bf16",
        "bf16-stochastic",
        "bf16-split24",
        "bf16-split32",
        "fp16",
        "fp16-split24",
        "fp16-split32",
        "amsgrad",
        "maximize-far",
        "coupled",
    ],
)
def test_same_codes_for_every_option(dtype, options, device) -> None:
    run(*pair(FORMATS["dynamic8"], device, FEW, dtype=dtype, **options))


ONE_MOMENT = ("dynamic8(block_size=64, rounding=stochastic)", "fp32")


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("formats", [ONE_MOMENT, FORMATS["fp32"]], ids=["dynamic8", "fp32"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (SGD(), {"weight_decay": 0.1}),
        (SGD(), {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        (SGD(decoupled=True), {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (SGD(), {"momentum": 0.9, "maximize": True}),
        (Lion(), {"lr": 1e-2, "weight_decay": 0.1}),
        (Lion(), {"lr": 1e-2, "betas": (0.4, 0.3), "maximize": True}),
    ],
    ids=["sgd-plain", "sgd", "sgd-nesterov-decoupled", "sgd-maximize", "lion", "lion-far-maximize"],
)
def test_same_codes_for_one_moment_and_none(rule, options, formats, device) -> None:
    for dtype, write in ((torch.float32, "nearest"), (torch.bfloat16, "stochastic")):
        reference, kernel = pair(
            formats, device, FEW, rule=rule, dtype=dtype, write=write, **options
        )
        run(reference, kernel)
        # by the kernel, every one of them
        assert all(not plan.fallback for plan in kernel.optimizer.executor._plans.values())


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("options", [{"momentum": 0.9, "nesterov": True}, {}], ids=["sgd", "none"])
def test_what_rounding_leaves_out_of_sgd_is_delivered_alike(options, device) -> None:
    rule = SGD(error_feedback=True)
    reference, kernel = pair(("int4(block_size=64)", "fp32"), device, FEW, rule=rule, **options)
    run(reference, kernel)
    assert all(not plan.fallback for plan in kernel.optimizer.executor._plans.values())


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("formats", ["fp32", "bf16", "dynamic8"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (RMSProp(), {"weight_decay": 0.1, "maximize": True}),
        (Compass(), {"weight_decay": 0.1}),
        (Compass(), {"betas": (0.4, 0.9), "maximize": True}),
        (LPFAdamW(), {"weight_decay": 0.1}),
        (LPFAdamW(), {"betas": (0.4, 0.3, 0.9), "maximize": True}),
    ],
    ids=["rmsprop", "compass", "compass-far-maximize", "lpf", "lpf-far-maximize"],
)
def test_same_codes_for_ema_rules(rule, options, formats, device) -> None:
    dtype, write = torch.float32, "nearest"
    if formats == "bf16":
        dtype, write = torch.bfloat16, "stochastic"
    reference, kernel = pair(
        FORMATS[formats], device, FEW, rule=rule, dtype=dtype, write=write, **options
    )
    run(reference, kernel)
    assert all(not plan.fallback for plan in kernel.optimizer.executor._plans.values())


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("rule", [SGD(), Lion()], ids=["sgd", "lion"])
def test_nonfinite_stays_where_it_is_under_every_rule(rule, device) -> None:
    options = {"momentum": 0.9} if rule.name == "sgd" else {}
    for value in (float("nan"), float("inf"), -float("inf")):
        reference, kernel = pair(ONE_MOMENT, device, ((3, 1024),), rule=rule, **options)
        for trainer in (reference, kernel):
            param = trainer.params[0]
            for bad in (value, 1.0):
                param.grad = torch.ones_like(param)
                param.grad[1, 5] = bad
                trainer.optimizer.step()
        compare(reference, kernel)
        assert int((~torch.isfinite(kernel.params[0])).sum()) == 1


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", ["dynamic8", "bf16", "int8", "fp8", "4bit"])
def test_nonfinite_stays_where_it_is(name, device) -> None:
    reference, kernel = pair(FORMATS[name], device, ((3, 1024),))
    for value in (float("nan"), float("inf"), -float("inf")):
        for trainer in (reference, kernel):
            trainer.run(1)
            grad = torch.ones(3, 1024)
            grad[1, 5] = value
            trainer.params[0].grad = grad.to(trainer.params[0].device)
            trainer.optimizer.step()
        compare(reference, kernel)
        assert not torch.isfinite(kernel.params[0][1, 5])
        assert int((~torch.isfinite(kernel.params[0])).sum()) == 1


@pytest.mark.parametrize("device", devices())
def test_layouts_and_what_the_kernel_leaves_to_the_reference(device) -> None:
    """Dense layouts run in the kernel; others, float64 and mixed blocks in the reference."""
    reference, kernel = pair(FORMATS["dynamic8"], device, ((4, 8, 6, 6),) * 4)
    layouts = [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.cat([t, t], 3)[..., ::2],
        lambda t: t.double(),
    ]
    for trainer in (reference, kernel):
        for param, layout in zip(trainer.params, layouts, strict=True):
            param.data = layout(param.data)
    for _ in range(2):
        for trainer in (reference, kernel):
            for i, param in enumerate(trainer.params):
                grad = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(i))
                param.grad = torch.empty_like(param).copy_(grad)
            trainer.optimizer.step()
    compare(reference, kernel)
    (plan,) = kernel.optimizer.executor._plans.values()
    assert len(plan.fallback) == 2
    assert sum(len(bucket.param_steps) for bucket in plan.buckets) == 2


@pytest.mark.parametrize("device", devices())
def test_misaligned_addresses_take_the_narrow_kernel(device) -> None:
    reference, kernel = pair(FORMATS["dynamic8"], device, ((32, 64), (32, 64)))
    for trainer in (reference, kernel):
        data = trainer.params[0].data
        base = torch.empty(data.numel() + 1, device=data.device)
        trainer.params[0].data = base[1:].view(32, 64).copy_(data)
    reference.run(1)
    kernel.run(1)
    compare(reference, kernel)
    (plan,) = kernel.optimizer.executor._plans.values()
    assert sorted(bucket.aligned for bucket in plan.buckets) == [False, True]


@pytest.mark.parametrize("device", devices())
def test_groups_and_late_starters_share_a_launch(device) -> None:
    reference, kernel = pair(FORMATS["dynamic8"], device, ((256,), (256,)))
    for trainer in (reference, kernel):
        late = torch.nn.Parameter(torch.ones(256, device=trainer.params[0].device))
        trainer.run(1)
        trainer.optimizer.add_param_group({"params": [late], "lr": 0.1, "weight_decay": 0.5})
        trainer.params.append(late)
        trainer.run(1)
    compare(reference, kernel)
    plan = list(kernel.optimizer.executor._plans.values())[-1]
    assert len(plan.buckets) == 1
    assert len(plan.buckets[0].param_steps) == 3


@pytest.mark.parametrize("device", devices())
def test_counts_that_drift_apart_get_rows_of_their_own(device) -> None:
    """Gradients that come and go: a kept plan must notice that counts have changed."""
    reference, kernel = pair(FORMATS["fp32"], device, ((64,), (64,), (64,)))
    for trainer in (reference, kernel):
        trainer.run(8)
    counts = [float(s["step"]) for s in kernel.optimizer.state.values()]
    assert len(set(counts)) > 1
    compare(reference, kernel)


@pytest.mark.parametrize("device", devices())
def test_plans_are_kept_until_something_changes(device, monkeypatch) -> None:
    _, kernel = pair(FORMATS["dynamic8"], device, ((64,), (64,)))
    built = []

    def counting(request):
        built.append(len(request.param_steps))
        return build_buckets(request)

    monkeypatch.setattr("optstate_codecs.engine.executor.build_buckets", counting)
    params, optimizer = kernel.params, kernel.optimizer

    def step() -> int:
        for param in params:
            if param.grad is None:
                param.grad = torch.ones_like(param)
        optimizer.step()
        return len(built)

    assert [step() for _ in range(3)] == [1, 1, 1]
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.param_groups[0]["betas"] = (0.8, 0.9)
    optimizer.param_groups[0]["weight_decay"] = 0.25
    assert step() == 1
    params[0].grad = torch.zeros_like(params[0])
    assert step() == 1
    params[0].data = params[0].data.clone()
    assert step() == 2
    optimizer.load_state_dict(optimizer.state_dict())
    assert step() == 3
    params[1].grad = None
    params[1].requires_grad_(False)
    optimizer.step()
    assert built == [2, 2, 2, 1]


@pytest.mark.parametrize("device", devices())
def test_scaler_on_the_device(device) -> None:
    """fused=True: unscaling and skipping happen in the launch."""
    reference, kernel = pair(FORMATS["dynamic8"], device, ((300,),), fused=True)
    for skip in (0.0, 1.0, 0.0):
        for trainer in (reference, kernel):
            param, optimizer = trainer.params[0], trainer.optimizer
            param.grad = torch.linspace(-1, 1, 300, device=param.device) * 64
            optimizer.grad_scale = torch.tensor(64.0, device=param.device)
            optimizer.found_inf = torch.tensor(skip, device=param.device)
            optimizer.step()
        compare(reference, kernel)
    assert float(kernel.optimizer.state[kernel.params[0]]["step"]) == 2


@pytest.mark.parametrize("device", devices())
def test_tensor_hyper_parameters_are_read_where_they_are(device) -> None:
    reference, kernel = pair(FORMATS["fp32"], device, ((300,),))
    kernel.optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, device=device)
    for lr in (1e-3, 5e-2):
        reference.optimizer.param_groups[0]["lr"] = lr
        kernel.optimizer.param_groups[0]["lr"].fill_(lr)
        reference.run(1)
        kernel.run(1)
        compare(reference, kernel)


def test_a_backend_asked_for_by_name_runs_or_raises(monkeypatch) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="backend='cuda': must be one of 'auto', 'eager'"):
        CodedOptimizer([param], Adam(), {}, backend="cuda")
    monkeypatch.setenv("OPTSTATE_BACKEND", "fast")
    with pytest.raises(ValueError, match="OPTSTATE_BACKEND='fast': must be one of"):
        CodedOptimizer([param], Adam(), {"exp_avg": "fp32", "exp_avg_sq": "fp32"})
    monkeypatch.delenv("OPTSTATE_BACKEND")
    if HAS_TRITON and not INTERPRETED:
        formats = {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
        optimizer = CodedOptimizer([param], Adam(), formats, backend="triton")
        param.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="parameters must be on a CUDA device"):
            optimizer.step()


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("fused", [None, True])
def test_a_step_never_waits_for_the_device(fused) -> None:
    _, kernel = pair(FORMATS["dynamic8"], "cuda", SHAPES[:5], fused=fused)
    params, optimizer = kernel.params, kernel.optimizer
    for param in params:
        param.grad = torch.ones_like(param)
    if fused:
        optimizer.grad_scale = torch.ones((), device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_changing_numbers_compiles_nothing() -> None:
    from optstate_codecs.engine.triton.kernel import step_kernel

    _, kernel = pair(FORMATS["dynamic8"], "cuda", ((64, 64),))
    kernel.run(2)
    compiled = [len(caches[0]) for caches in step_kernel.device_caches.values()]
    group = kernel.optimizer.param_groups[0]
    for lr, betas, decay in ((1.0, (0.8, 0.9), 0.0), (0.0, (0.95, 0.9999), 1.0)):
        group.update(lr=lr, betas=betas, weight_decay=decay)
        kernel.run(2)
    assert [len(caches[0]) for caches in step_kernel.device_caches.values()] == compiled


@pytest.mark.cuda
def test_more_elements_than_32_bits_count() -> None:
    numel = 2**31 + 4096
    param = torch.nn.Parameter(torch.ones(numel, device="cuda", dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    formats = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
    CodedOptimizer([param], Adam(), formats, lr=0.5).step()
    data = param.detach()
    assert all(float(part.min()) == float(part.max()) == 0.5 for part in data.split(2**30))


@pytest.mark.cuda
def test_loads_are_sixteen_bytes_wide() -> None:
    from optstate_codecs.engine.triton.kernel import step_kernel

    _, kernel = pair(FORMATS["dynamic8"], "cuda", ((64, 64),), torch.bfloat16)
    kernel.run(1)
    programs = [p for caches in step_kernel.device_caches.values() for p in caches[0].values()]
    assert "ld.global.v4.b32" in programs[-1].asm["ptx"]


@pytest.mark.cuda
def test_tensors_are_stepped_on_their_own_gpu() -> None:
    """Whichever is current: triton alone would launch there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    for options in ({}, {"centralization": 0.5}):
        reference, kernel = pair(FORMATS["dynamic8"], "cuda:1", FEW, **options)
        with torch.cuda.device(0):
            run(reference, kernel)
        assert all(not plan.fallback for plan in kernel.optimizer.executor._plans.values())


@pytest.mark.parametrize("device", devices())
def test_parameters_with_names_and_keys_draw_as_the_reference(device) -> None:
    results = []
    for backend, where in (("eager", "cpu"), ("triton", device)):
        torch.manual_seed(0)
        values = [torch.randn(300).bfloat16().to(where) for _ in range(2)]
        params = [torch.nn.Parameter(value) for value in values]
        groups = [
            {"params": [("layers.0.weight", params[0])]},
            {"params": [("layers.1.weight", params[1])], "rounding_key": "b"},
        ]
        formats = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
        options = {"write": "stochastic", "backend": backend, "lr": 1e-2}
        optimizer = CodedOptimizer(groups, Adam(), formats, **options)
        for step in range(3):
            for param in params:
                param.grad = torch.linspace(-1, 1 + step, 300).bfloat16().to(where)
            optimizer.step()
        codes = [optimizer.state[p]["exp_avg_codes"] for p in params]
        results.append([t.detach().cpu() for t in (*params, *codes)])
    assert all(map(torch.equal, *results))
