"""Law 7 on a CPU: compiled kernels give the reference's bits."""

import ctypes
import os
import shlex
import shutil
from functools import partial

import pytest
import torch
import twins
from subjects import SECOND

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.engine.cpu import build, choice, kernels
from optstate_codecs.engine.cpu.prelude import PRELUDE
from optstate_codecs.engine.cpu.record import Unrecordable, record
from optstate_codecs.engine.cpu.torch_root import torch_root
from optstate_codecs.exact import TAIL, rounds_once, sqrt_is_exact
from optstate_codecs.formats.dynamic import computed_position, position_of, value_table, values_of
from optstate_codecs.rules import SGD, Compass, Lion, LPFAdamW, RMSProp
from optstate_codecs.testing import Trainer

FIRST = "dynamic8(block_size=256, rounding=stochastic, units=update)"
FOUR = "minifloat(block_size=128, domain=sqrt, rounding=stochastic, lift=0.03125)"
FP8 = "fp8(block_size=256, rounding=paired, units=update)"
EIGHT = "minifloat(exponent_bits=4, mantissa_bits=4, block_size=256, rounding=stochastic)"
FORMATS = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16(rounding=nearest)"),
    "int8": ("int8(rounding=stochastic, units=update)", "fp32"),
    "dynamic8": (FIRST, SECOND),
    "dynamic8-plain": ("dynamic8(block_size=64)", "dynamic8(block_size=64, signed=False)"),
    "dynamic8-10": ("dynamic8(base=10)", "dynamic8(base=10, signed=False, domain=sqrt)"),
    "fp8": (FP8, EIGHT),
    "4-bit": ("int4(block_size=128, rounding=paired, units=update)", FOUR),
    "blocks of two sizes": ("int4(block_size=128, rounding=paired, units=update)", SECOND),
    "4-bit maps": ("dynamic4", "linear4"),
    "costate1-oneq8": ("costate(bits=1)", "oneq(bits=8)"),
    "costate2-oneq3": ("costate(bits=2)", "oneq(bits=3)"),
    "costate3-oneq4": ("costate(bits=3, amp_pct=0.9, null_pct=0.2)", "oneq(bits=4)"),
    "costate4-oneq2": ("costate(bits=4)", "oneq(bits=2)"),
    "costate6-oneq6": ("costate(bits=6)", "oneq(bits=6)"),
}
# several rows, tails of every kind, one element, none, no dimensions
SHAPES = ((96, 128), (61, 83), (4097,), (129,), (16,), (1,), (0,), ())

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_compiler(monkeypatch):
    """A compiler that fails, and nothing built or warned of before."""
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(choice, "_warned", set())
    forget_kernels()
    yield
    forget_kernels()


def forget_kernels() -> None:
    """As in another process."""
    kernels.compiled_kernel.cache_clear()
    choice.choice_of.cache_clear()


def pair(formats: tuple[str, str], shapes=SHAPES, dtype=torch.float32, **options):
    """The reference and the kernels, over equal parameters."""
    return twins.pair("compile", (*formats, formats[0]), shapes, dtype, **options)


def compare(reference: Trainer, ours: Trainer) -> None:
    """Parameters, codes, scales and whatever else there is are the same numbers."""
    for theirs, mine in zip(reference.params, ours.params, strict=True):
        state = ours.optimizer.state.get(mine, {})
        for key, expected in reference.optimizer.state.get(theirs, {}).items():
            torch.testing.assert_close(state[key], expected, msg=key, **tolerance(expected))
        torch.testing.assert_close(mine, theirs, **tolerance(theirs))


def tolerance(like: torch.Tensor) -> dict:
    """None; but where torch rounds the ends of tensors otherwise than the rest, kernels do not."""
    operations = ("add", "addcmul", "lerp")
    if all(rounds_once(name) is rounds_once(name, TAIL) for name in operations):
        return {"rtol": 0, "atol": 0, "equal_nan": True}
    return {"rtol": 1e-2, "atol": 1e-7 if like.is_floating_point() else 1, "equal_nan": True}


def run(reference: Trainer, ours: Trainer, steps: int = 4) -> None:
    for _ in range(steps):
        reference.run(1)
        ours.run(1)
        compare(reference, ours)


def stepped_by_kernels(trainer: Trainer) -> list[bool]:
    """Of each parameter that has taken a step."""
    param_steps = trainer.optimizer.stored_param_steps()
    return trainer.optimizer.executor.compiled.stepped_by_kernels(param_steps)


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_same_codes_for_every_format(formats) -> None:
    reference, ours = pair(formats)
    run(reference, ours, steps=6)
    # torch.optim's roots, which fp32 formats take, are not exact everywhere
    has_roots = sqrt_is_exact() or torch_root() is not None
    assert set(stepped_by_kernels(ours)) == {formats != FORMATS["fp32"] or has_roots}


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [(Adam(decoupled=True), torch.optim.AdamW), (SGD(), torch.optim.SGD)],
    ids=["adamw", "sgd"],
)
def test_float32_moments_give_the_bits_of_torch(rule, theirs) -> None:
    """Law 1, whoever takes the step."""
    options = {"lr": 0.03, "weight_decay": 0.1}
    options |= {"momentum": 0.9} if isinstance(rule, SGD) else {"betas": (0.8, 0.99)}
    chosen = dict.fromkeys(("exp_avg", "exp_avg_sq", "momentum_buffer"), "fp32")
    shapes = ((3000,), (61, 83), (7,))
    expected = Trainer(lambda params: theirs(params, **options), shapes).run(20)
    make = partial(CodedOptimizer, rule=rule, formats=chosen, backend="compile", **options)
    ours = Trainer(make, shapes).run(20)
    for mine, due in zip(ours.params, expected.params, strict=True):
        assert torch.equal(mine, due)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (SGD(), {"lr": 0.1}),
        (SGD(), {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        (SGD(decoupled=True), {"momentum": 0.9, "nesterov": True, "maximize": True}),
        (Lion(), {"lr": 1e-2, "weight_decay": 0.1}),
        (RMSProp(), {"weight_decay": 0.1}),
        (Compass(), {"weight_decay": 0.1}),
        (LPFAdamW(), {"maximize": True}),
    ],
    ids=["sgd-plain", "sgd", "sgd-nesterov-decoupled", "lion", "rmsprop", "compass", "lpf"],
)
def test_same_codes_for_every_rule(rule, options) -> None:
    formats = ("dynamic8(block_size=64, rounding=stochastic)", "fp32")
    reference, ours = pair(formats, rule=rule, **options)
    run(reference, ours)
    assert all(stepped_by_kernels(ours))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"write": "stochastic"}),
        (torch.bfloat16, {"write": "split24"}),
        (torch.float32, {"amsgrad": True}),
        (torch.float32, {"maximize": True, "betas": (0.4, 0.95)}),
        (torch.float32, {"decoupled": False, "weight_decay": 0.3}),
        (torch.float32, {"centralization": 0.7}),
        (torch.float32, {"rule": Adam(decoupled=True, error_feedback=True)}),
    ],
    ids=["bf16-stochastic", "bf16-split", "amsgrad", "maximize", "coupled", "centred", "feedback"],
)
def test_same_codes_for_every_option(dtype, options) -> None:
    reference, ours = pair(FORMATS["dynamic8"], dtype=dtype, **options)
    run(reference, ours)
    assert all(stepped_by_kernels(ours))


@pytest.mark.parametrize("name", ["dynamic8", "fp32", "4-bit", "costate3-oneq4"])
def test_rows_that_are_not_finite_or_out_of_range(name) -> None:
    """They take the slow functions; 1e-25 has a square that no float holds."""
    reference, ours = pair(FORMATS[name], ((5, 1024), (1500,)))
    for value in (float("nan"), float("inf"), -float("inf"), 1e-25, 1e25):
        for trainer in (reference, ours):
            trainer.run(1)
            for param in trainer.params:
                param.grad = torch.full_like(param, 1e-3)
                param.grad.view(-1)[1025] = value
            trainer.optimizer.step()
        compare(reference, ours)
    bad = (~torch.isfinite(ours.params[0])).nonzero().tolist()
    assert bad == [[1, 1]]


def test_layouts_and_what_is_left_to_the_reference() -> None:
    reference, ours = pair(FORMATS["dynamic8"], ((4, 8, 6, 6),) * 5)
    layouts = [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.cat([t, t], 3)[..., ::2],
        lambda t: t.double(),
        lambda t: t.half(),
    ]
    for trainer in (reference, ours):
        for param, layout in zip(trainer.params, layouts, strict=True):
            param.data = layout(param.data)
    for step in range(2):
        for trainer in (reference, ours):
            for i, param in enumerate(trainer.params):
                generator = torch.Generator().manual_seed(10 * step + i)
                grad = torch.randn(4, 8, 6, 6, generator=generator)
                param.grad = torch.empty_like(param).copy_(grad)
            trainer.optimizer.step()
    compare(reference, ours)
    assert stepped_by_kernels(ours) == [True, True, False, False, False]


def test_formats_without_a_form_in_c_are_left_to_the_reference() -> None:
    reference, ours = pair(("int4(units=update)", "linear4(normalization=rank1)"), ((30, 10),))
    run(reference, ours, steps=2)
    assert stepped_by_kernels(ours) == [False]


def test_nothing_beyond_a_tensor_is_touched() -> None:
    for numel in (1, 255, 256, 257, 515):
        around = torch.full((numel + 64,), 7.0)
        around[32:-32] = 1.0
        param = torch.nn.Parameter(around[32:-32])
        param.grad = torch.ones(numel)
        formats = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
        CodedOptimizer([param], Adam(), formats, backend="compile", lr=0.5).step()
        torch.testing.assert_close(around[32:-32], torch.full((numel,), 0.5))
        assert (around[:32] == 7).all()
        assert (around[-32:] == 7).all()


def test_groups_counts_and_late_starters() -> None:
    reference, ours = pair(FORMATS["dynamic8"], ((256,), (300,), (64,)))
    for trainer in (reference, ours):
        trainer.run(3)
        late = torch.nn.Parameter(torch.ones(256))
        trainer.optimizer.add_param_group({"params": [late], "lr": 0.1, "weight_decay": 0.5})
        trainer.params.append(late)
        trainer.run(4)
    assert len({float(s["step"]) for s in ours.optimizer.state.values()}) > 1
    compare(reference, ours)


def test_scaling_and_skipping_are_part_of_the_step() -> None:
    reference, ours = pair(FORMATS["dynamic8"], ((300,),), fused=True)
    for skip in (0.0, 1.0, 0.0):
        for trainer in (reference, ours):
            param, optimizer = trainer.params[0], trainer.optimizer
            param.grad = torch.linspace(-1, 1, 300) * 48
            optimizer.grad_scale = torch.tensor(48.0)
            optimizer.found_inf = torch.tensor(skip)
            optimizer.step()
        compare(reference, ours)
    assert float(ours.optimizer.state[ours.params[0]]["step"]) == 2


def test_threads_do_not_change_a_bit() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            _, ours = pair(FORMATS["dynamic8"], ((300, 255), (7,), (60, 1000)))
            results.append(ours.run(2).tensors())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_nothing_is_built_twice(monkeypatch) -> None:
    """Hyper-parameters, step counts and sizes are arguments; a file serves other processes."""
    built, compilations = [], []
    real_build, real_compile = kernels.build, build._compile
    monkeypatch.setattr(kernels, "build", lambda text: built.append(text) or real_build(text))
    monkeypatch.setattr(
        build, "_compile", lambda *given: compilations.append(given) or real_compile(*given)
    )
    forget_kernels()
    _, ours = pair(("dynamic8(block_size=32)", "dynamic8(block_size=32, signed=False)"))
    ours.run(6)
    for lr, betas, decay, eps in ((1.0, (0.8, 0.9), 0.0, 1e-8), (0.0, (0.4, 0.9999), 1.0, 0.5)):
        ours.optimizer.param_groups[0].update(lr=lr, betas=betas, weight_decay=decay, eps=eps)
        ours.run(2)
    ours.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(12345))]})
    ours.params.append(ours.optimizer.param_groups[1]["params"][0])
    ours.run(2)
    assert (len(built), len(compilations)) == (1, 1)
    forget_kernels()
    _, again = pair(("dynamic8(block_size=32)", "dynamic8(block_size=32, signed=False)"))
    again.run(1)
    assert (len(built), len(compilations)) == (2, 1)


@pytest.mark.usefixtures("no_compiler")
def test_a_backend_asked_for_by_name_runs_or_raises(monkeypatch) -> None:
    formats = {"exp_avg": "bf16", "exp_avg_sq": "bf16"}
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = CodedOptimizer([param], Adam(), formats, backend="compile")
    with pytest.raises(RuntimeError, match=r"backend='compile': needs a working C\+\+ compiler"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))
    assert float(optimizer.state[param]["step"]) == 0
    monkeypatch.setenv("CXX", "no-such-program")
    with pytest.raises(RuntimeError, match="CXX='no-such-program' is not a program"):
        CodedOptimizer([param], Adam(), formats, backend="compile")
    monkeypatch.setenv("OPTSTATE_BACKEND", "compile")
    with pytest.raises(RuntimeError, match="use backend='eager'"):
        CodedOptimizer([param], Adam(), formats)


@pytest.mark.cuda
def test_parameters_elsewhere_are_refused() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    param = torch.nn.Parameter(torch.ones(3, device="cuda"))
    param.grad = torch.ones_like(param)
    formats = {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
    with pytest.raises(RuntimeError, match="parameters must be on the CPU"):
        CodedOptimizer([param], Adam(), formats, backend="compile").step()


def test_options_in_cxx_win(monkeypatch) -> None:
    """``-O0`` leaves undefined what our ``-O3`` defines."""
    text = """
        #include <stdint.h>
        extern "C" void run(int64_t, int64_t, float *x, void *, void *, int) {
        #ifdef __OPTIMIZE__
            *x = 1;
        #else
            *x = 2;
        #endif
        }"""
    compiler = shlex.join(build.compiler())
    found = []
    for command in (compiler, f"{compiler} -O0"):
        monkeypatch.setenv("CXX", command)
        x = torch.zeros(1)
        build.build(text)(0, 0, x.data_ptr(), None, None, 1)
        found.append(float(x))
    assert found == [1.0, 2.0]


def test_only_flags_may_be_asked_for() -> None:
    inputs = {"x": torch.ones(4)}
    found = record(lambda given: bool((given["x"] > 0).all()), inputs, assume=True)
    assert [flag.dtype for flag in found.assumptions] == [torch.bool]
    with pytest.raises(Unrecordable, match="read by the host"):
        record(lambda given: float(given["x"].sum()), inputs, assume=True)


def test_corrected_division_is_division() -> None:
    """A product with the reciprocal, corrected once, has the quotient's bits."""
    text = PRELUDE + (
        'extern "C" void run(int64_t n, int64_t unused, const float *x, const float *y, float *z,'
        " int threads) {"
        " for (int64_t i = 0; i < n; i++) z[i] = divide(x[i], y[i], 1.0f / y[i]); }"
    )
    generator = torch.Generator().manual_seed(0)
    x, power = torch.rand(2, 1_000_000, generator=generator).unbind()
    x = (x + 2.0**-24) * 2.0 ** (power * 60 - 40).round()
    y = torch.rand(x.shape, generator=generator).clamp_(min=1e-6)
    z = torch.empty_like(x)
    build.build(text)(x.numel(), 0, *(ctypes.c_void_p(t.data_ptr()) for t in (x, y, z)), 1)
    assert torch.equal(z, x / y)


def test_damaged_libraries_are_built_again() -> None:
    text = 'extern "C" void run(long, long, float *x, void *, void *, int) { *x = 3; }'
    assert build.find(text) is None
    build.build(text)
    (library,) = [
        p for p in build.cache_folder().iterdir() if build.find(text).library._name == str(p)
    ]
    content = library.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:200] + b"?" + content[201:]):
        library.unlink()
        library.write_bytes(damaged)
        assert build.find(text) is None
        x = torch.zeros(1)
        build.build(text)(0, 0, x.data_ptr(), None, None, 1)
        assert float(x) == 3


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files")
def test_folders_that_others_may_write_to_are_not_used(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = build.cache_folder()
    assert mine == tmp_path / "optstate"
    assert mine.stat().st_mode & 0o777 == 0o700
    mine.chmod(0o777)
    assert build.cache_folder() != mine
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "optstate"


@pytest.mark.parametrize("signed", [True, False])
def test_computed_values_are_the_table(signed) -> None:
    codes = torch.arange(255, dtype=torch.int32)
    table = value_table(signed, 8, torch.device("cpu"))[:255]
    assert torch.equal(values_of(codes, signed).view(torch.int32), table.view(torch.int32))


def test_computed_positions_are_those_of_the_lines() -> None:
    generator = torch.Generator().manual_seed(0)
    share, power = torch.rand(2, 1_000_000, generator=generator).unbind()
    magnitude = 1 + share * 8.0**7 * torch.exp2(-22 * power)
    assert torch.equal(computed_position(magnitude), position_of(magnitude, 8))
