"""Law 11 where a single optimizer does not show it: formats, rules, loops, caches, other stores.

torch's default dtype and device are what a training framework has set while it builds a model. A
mode (inference, fake tensors, a compiler's) may be on when a table is wanted for the first time.
"""

import hashlib
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from released import backward
from subjects import FIRST, SECOND, SUBJECTS, adam
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import Parameter

from optstate_codecs import FP8, Adam, GradientRelease, Int4, Minifloat
from optstate_codecs.convert import adam_state_dict
from optstate_codecs.engine.cpu import kernels
from optstate_codecs.formats import format_names, parse_format
from optstate_codecs.gradients.centralization import find_grad_means
from optstate_codecs.gradients.grad_norm import nonfinite
from optstate_codecs.offloading import offload, snapshot
from optstate_codecs.rounding import Draw
from optstate_codecs.rules import SGD, Compass, Lion, LPFAdamW, RMSProp
from optstate_codecs.rules.base import host_scalar
from optstate_codecs.tables import forget_tables
from optstate_codecs.testing import (
    DEFAULTS,
    Trainer,
    tensors_in,
    torch_defaults,
)
from optstate_codecs.testing.subject import assert_same
from optstate_codecs.views import decode_state
from optstate_codecs.writes import parameter_write

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow)")

PAIRS = {
    "fp16-and-fp8": ("fp16(block_size=64)", "fp8(block_size=64, signed=False)"),
    "fp8": (FP8.first_moment(256).spec, Minifloat.second_moment8(256).spec),
    "dynamic8": (FIRST, SECOND),
    "dynamic8-10": ("dynamic8(base=10)", "dynamic8(base=10, signed=False, domain=sqrt)"),
    "published-4-bit": ("dynamic4", "linear4"),
    "4-bit": (Int4.first_moment().spec, Minifloat.second_moment4().spec),
    "minifloat": (
        "minifloat(exponent_bits=1, signed=True)",
        "minifloat(exponent_bits=3, mantissa_bits=1)",
    ),
    "int8": ("int8(rounding=stochastic)", "oneq(bits=8)"),
    "turbo": ("costate(bits=3, amp_pct=0.8, null_pct=0.1)", "oneq(bits=2)"),
}
SHAPES = ((61, 83), (129,), ())
EACH = pytest.mark.parametrize(
    ("dtype", "device"), DEFAULTS, ids=lambda v: str(v).removeprefix("torch.")
)


NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _defaults_stay():
    before = torch.get_default_dtype(), torch.get_default_device()
    yield
    after = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(before[0])
    torch.set_default_device(None)
    assert after == before


def forget() -> None:
    """Empty the caches, as in a process that has just begun."""
    forget_tables()
    kernels.compiled_kernel.cache_clear()


def life(backend: str = "eager", pairs=PAIRS) -> dict[str, torch.Tensor]:
    """What optimizers of all formats make of a few steps."""
    found = {}
    for name, formats in pairs.items():
        trainer = Trainer(adam(*formats, backend=backend), SHAPES).run(3)
        found |= tensors_in(name, trainer.tensors())
        found |= tensors_in(f"{name} full", trainer.optimizer.full_state_dict())
    return found


def test_every_format_is_among_them() -> None:
    pairs = [s.make.keywords["formats"].values() for s in SUBJECTS] + [*PAIRS.values()]
    assert {parse_format(spec).name for pair in pairs for spec in pair} == set(format_names())


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["dynamic8", "4-bit"])
def test_kernels(name) -> None:
    """A step's tables, and the kernels that read them; few tiles, each of which takes long."""
    options = {"max_grad_norm": 1.0, "centralization": 0.5}
    make = adam(*PAIRS[name], backend="triton", **options)
    expected = Trainer(make, ((3, 83), ())).run(2).tensors()
    for dtype, device in ((torch.bfloat16, None), (torch.float64, "meta")):
        forget()
        with torch_defaults(dtype, device):
            got = Trainer(make, ((3, 83), ())).run(2).tensors()
        assert_same(f"{dtype}, {device}", expected, got)


@pytest.mark.parametrize("write", ["nearest", "split24"])
@pytest.mark.parametrize("name", ["dynamic8", "dynamic8-10", "fp8", "4-bit", "minifloat"])
def test_what_is_recorded_for_compiled_kernels(name, write) -> None:
    rule = Adam()
    moments = rule.moments(rule.hyper(rule.defaults()))
    formats = tuple(map(parse_format, PAIRS[name]))
    written = parameter_write(write, torch.bfloat16)
    spec = kernels.KernelSpec(
        rule, (False, False), moments, formats, written, False, torch.float32, 7
    )
    expected = kernels.source(spec)
    for dtype, device in DEFAULTS:
        with torch_defaults(dtype, device):
            assert kernels.source(spec) == expected
    with torch.inference_mode():
        assert kernels.source(spec) == expected


@NEEDS_COMPILER
@EACH
def test_loops_made_under_other_defaults(dtype, device) -> None:
    pairs = {"dynamic8": PAIRS["dynamic8"]}
    expected = life("compile", pairs)
    forget()
    with torch_defaults(dtype, device):
        assert_same("under them", expected, life("compile", pairs))
    assert_same("afterwards", expected, life("compile", pairs))


def decoded_in_mode() -> None:
    """What formats make in a mode that is on; fake tensors have no numbers to ask for."""
    for spec in [spec for pair in PAIRS.values() for spec in pair]:
        format = parse_format(spec).for_shape((4, 64), (0, 1))
        parts = [torch.zeros(c.length(256), dtype=c.dtype) for c in format.components]
        with suppress(DataDependentOutputException):
            format.decode(parts)
        with suppress(DataDependentOutputException):
            format.encode(torch.ones(256), parts, Draw(0, 1, 0, 1))


def in_inference_mode() -> None:
    with torch.inference_mode():
        decoded_in_mode()
        life()


def on_fake_tensors() -> None:
    with FakeTensorMode():
        decoded_in_mode()


def while_a_compiler_traces() -> None:
    format = parse_format("dynamic8(block_size=64)")

    @torch.compile(backend="aot_eager")
    def traced(codes, scale):
        return format.decode([codes, scale]), Draw(0, 1, 0, 0).bits16(64)

    codes, scale = torch.arange(128, dtype=torch.uint8), torch.ones(2)
    try:
        decoded, bits = traced(codes, scale)
    finally:
        torch._dynamo.reset()
    assert torch.equal(decoded, format.decode([codes, scale]))
    assert torch.equal(bits, Draw(0, 1, 0, 0).bits16(64))


def under_another_default(dtype, device=None) -> None:
    with torch_defaults(dtype, device):
        life()


def under_a_device_of_its_own() -> None:
    torch.set_default_device("meta")
    life()
    torch.set_default_device(None)


FIRST_USES = {
    "inference": in_inference_mode,
    "fake tensors": on_fake_tensors,
    "compiler": while_a_compiler_traces,
    "bfloat16": partial(under_another_default, torch.bfloat16),
    "float64": partial(under_another_default, torch.float64),
    "meta": under_a_device_of_its_own,
}


@pytest.fixture(scope="module")
def usual() -> dict[str, torch.Tensor]:
    forget()
    return life()


@pytest.mark.parametrize("first_use", FIRST_USES.values(), ids=FIRST_USES)
def test_a_first_use_elsewhere_leaves_nothing_behind(first_use, usual) -> None:
    forget()
    first_use()
    found = life()
    assert not any(value.is_inference() for value in found.values())
    assert_same("afterwards", usual, found)


@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=NEEDS_COMPILER)])
def test_a_first_step_in_inference_mode_is_like_any_other(backend) -> None:
    make = adam(FIRST, SECOND, backend=backend)
    expected = Trainer(make, SHAPES).run(3).tensors()
    forget()
    trainer = Trainer(make, SHAPES)
    with torch.inference_mode():
        trainer.run(1)
    assert_same("stepped", expected, trainer.run(2).tensors())

    saved, other = Trainer(make, SHAPES).run(2), Trainer(make, SHAPES)
    for mine, theirs in zip(other.params, saved.params, strict=True):
        mine.data.copy_(theirs.data)
    other.time = saved.time
    with torch.inference_mode():
        other.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert_same("loaded", expected, other.run(1).tensors())


SCRIPT = """
import sys, torch
torch.set_default_dtype(torch.bfloat16)
sys.path.insert(0, sys.argv[1])
from test_defaults import digest
first = digest()
torch.set_default_dtype(torch.float32)
print(first, digest())
"""


def digest() -> str:
    numbers = [value.view(-1).view(torch.uint8).numpy().tobytes() for value in life().values()]
    return hashlib.sha256(b"".join(numbers)).hexdigest()


def test_a_fresh_process_under_another_default() -> None:
    """Where nothing has been imported or cached before."""
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest()] * 2


RULES = {
    "adam": Adam(True, True),
    "sgd": SGD(),
    "lion": Lion(),
    "compass": Compass(),
    "lpf": LPFAdamW(),
    "rmsprop": RMSProp(),
}


@EACH
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_scalars_folded_on_a_device_are_those_folded_on_the_host(rule, dtype, device) -> None:
    """Beside step counts that are tensors, as capturable and fused steps have them."""
    own = {"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.1}
    group = {**rule.defaults(), **{k: v for k, v in own.items() if k in rule.defaults()}}
    counts = [1.0, 2.0, 257.0, 1001.0]
    steps = torch.tensor(counts, dtype=torch.float64)
    with torch_defaults(dtype, device):
        hyper = rule.hyper(group)
        for fold in (rule.scalars, rule.device_row):
            for place, value in enumerate(fold(hyper, steps)):
                exact = [float(fold(hyper, count)[place]) for count in counts]
                got = torch.as_tensor(value, dtype=torch.float64, device="cpu").expand(4)
                assert got.tolist() == pytest.approx(exact, rel=1e-12)


@EACH
def test_a_whole_number_on_a_device_is_multiplied_in_float32(dtype, device) -> None:
    rate = torch.ones((), dtype=torch.int64, device="meta")
    with torch_defaults(dtype, device):
        assert (host_scalar(rate) * 0.1).dtype == torch.float32


@EACH
def test_counts_that_are_converted(dtype, device) -> None:
    """bfloat16 has no 1001."""
    moments = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    theirs = {"state": {0: {"step": 1001}}, "param_groups": [{"params": [0], "lr": 1e-3}]}
    with torch_defaults(dtype, device):
        step = adam_state_dict(theirs, lambda *_: moments)["state"][0]["step"]
    assert (step.dtype, step.device.type, float(step)) == (torch.float32, "cpu", 1001.0)


@EACH
def test_numbers_of_gradients(dtype, device) -> None:
    grads = [torch.randn(40, 30, generator=torch.Generator().manual_seed(0)), torch.zeros(0)]
    with torch_defaults(dtype, device):
        means = find_grad_means(grads, [1.0, 1.0])
        nothing = nonfinite(grads[1:])
    (values,) = means.values.values()
    torch.testing.assert_close(values, grads[0].double().mean(1).float(), rtol=1e-5, atol=1e-7)
    assert nothing.dtype == torch.float32


def released(make, dtype, device):
    trainer = Trainer(make, SHAPES)
    with torch_defaults(dtype, device), GradientRelease(trainer.optimizer, max_grad_norm=0.5) as r:
        for _ in range(3):
            with r.measure():
                backward(trainer)
            backward(trainer)
            trainer.optimizer.step()
            trainer.time += 1
        norm = r.grad_norm
    return {**trainer.tensors(), "norm": norm}


@EACH
def test_gradient_release(dtype, device) -> None:
    make = adam(FIRST, SECOND)
    assert_same("released", released(make, torch.float32, None), released(make, dtype, device))


def three_steps(make, given, gradients, store=None, **options):
    """Three steps, the second of them number 1001, with the state elsewhere if ``store`` says."""
    optimizer = make(given)
    if store is not None:
        offload(optimizer, store, **options)
    for time, grads in enumerate(gradients):
        if time == 1:
            for state in optimizer.state.values():
                state["step"].fill_(1000.0)
        if time == 2 and store == "disk":
            optimizer.state  # noqa: B018 - waits until all is in the file
            del optimizer
            optimizer = offload(make(given), store, **options, resume=True)
        for param, grad in zip(given, grads, strict=True):
            param.grad = grad
        optimizer.step()
    with snapshot(optimizer) as taken:
        found = tensors_in("snapshot", taken.state_dict()["state"])
    return found | tensors_in("decoded", [decode_state(optimizer, p) for p in given])


@EACH
@pytest.mark.parametrize("store", ["host", "disk"])
def test_state_elsewhere(store, dtype, device, tmp_path) -> None:
    """Offloaded, gone on with from its file after step 1001, in a snapshot: the plain bits."""
    shapes = ((300, 70), (50,), (0,))
    plain, ours = ([Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    noise = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(s, generator=noise) for s in shapes] for _ in range(3)]
    make = adam(FIRST, SECOND, lr=1e-2, backend="eager")
    options = {"path": tmp_path / "state"} if store == "disk" else {}
    expected = three_steps(make, plain, gradients)
    with torch_defaults(dtype, device):
        got = three_steps(make, ours, gradients, store, chunk_bytes=9000, **options)
    assert_same("elsewhere", expected, got)
    assert all(map(torch.equal, plain, ours))
