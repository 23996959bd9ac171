"""State in host memory or in a file: the bits are those of state beside the parameters."""

from functools import partial

import pytest
import torch
from offloads import SHAPES, Pair, params
from subjects import adam
from torch.nn import Parameter

from optstate_codecs import CodedOptimizer, offloading, places
from optstate_codecs.offloading import offload
from optstate_codecs.rules import SGD

SIZES = {"tiny": 1, "small": 30_000, "default": 1 << 25}
DYNAMIC = (
    "dynamic8(rounding=stochastic, units=update)",
    "dynamic8(block_size=256, signed=False, domain=sqrt, rounding=stochastic)",
)
FORMATS = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "int8": ("int8(rounding=stochastic, units=update)", "fp32"),
    "dynamic8": DYNAMIC,
    "min elements": ("dynamic8(min_elements=4096)", "dynamic8(signed=False, min_elements=4096)"),
    "4-bit": ("int4(rounding=paired, units=update)", "linear4"),
    "fp8": ("fp8(rounding=stochastic)", "fp8(signed=False, rounding=stochastic)"),
    "rank 1": ("int4(rounding=paired, units=update)", "linear4(normalization=rank1)"),
    "costate": ("costate(bits=4)", "oneq(bits=3)"),
}


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, size):
    pair = Pair(adam(*FORMATS[name], lr=0.01, backend="eager"), chunk_bytes=SIZES[size])
    pair.run(3).check()
    pair.run(3).check()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["fp32", "dynamic8"])
def test_disk(name, size, path):
    where = {"store": "disk", "path": path, "chunk_bytes": SIZES[size]}
    pair = Pair(adam(*FORMATS[name], lr=0.01, backend="eager"), **where)
    pair.run(6).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("write", ["nearest", "stochastic", "split24"])
def test_dtypes_and_writes(dtype, write):
    make = adam(*DYNAMIC, lr=0.01, write=write, backend="eager")
    Pair(make, partial(params, dtype), chunk_bytes=30_000).run(6).check()


def _odd_layouts() -> list[Parameter]:
    base = torch.randn(32, 17, 9, 8, generator=torch.Generator().manual_seed(0))
    return [
        Parameter(base.to(memory_format=torch.channels_last)),
        Parameter(base.clone().transpose(0, 3)),
        Parameter(torch.cat([base, base], 3)[..., ::2]),
        Parameter(torch.cat([base.view(-1), base.view(-1)])[3 : 3 + base.numel()]),
        Parameter(torch.empty(0, 4)),
    ]


@pytest.mark.parametrize("formats", [("fp32", "fp32"), DYNAMIC], ids=["fp32", "dynamic8"])
def test_layouts(formats, where):
    Pair(adam(*formats, lr=0.01), _odd_layouts, chunk_bytes=30_000, **where).run(6).check()


@pytest.mark.parametrize("resident", [0, 100_000, 1 << 30])
@pytest.mark.parametrize("size", SIZES)
def test_some_of_it_stays_on_the_device(resident, size):
    options = {"chunk_bytes": SIZES[size], "resident_bytes": resident}
    Pair(adam(*DYNAMIC, lr=0.01), **options).run(7).check()


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"fused": True},
        {"capturable": True, "lr": torch.tensor(0.01)},
        {"lr": torch.tensor(0.01)},
        {"max_grad_norm": 0.5},
        {"centralization": 1.0},
        {"skip_nonfinite": True},
        {"error_feedback": True},
        {"maximize": True, "weight_decay": 0.1},
        {"rounding_seed": 77},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options):
    first = "int4(rounding=stochastic)" if "error_feedback" in options else DYNAMIC[0]
    Pair(adam(first, DYNAMIC[1], **options), chunk_bytes=30_000).run(7).check()


def test_rules_with_one_moment_and_with_none(where):
    make = partial(CodedOptimizer, rule=SGD(), formats={"momentum_buffer": "int8"}, lr=0.1)
    Pair(partial(make, momentum=0.9), chunk_bytes=9000).run(4).check()
    Pair(make, **where).run(4).check()


def test_compiled_loops():
    make = adam(*DYNAMIC, lr=0.01, backend="compile")
    Pair(make, chunk_bytes=30_000).run(6).check()


def test_what_is_worth_compiling_is_so_in_chunks():
    """A small chunk of a large job is stepped as the job without chunks is."""
    make = adam("fp32", "fp32", lr=0.01)
    pair = Pair(make, partial(params, shapes=((1024, 1100), (60,))), chunk_bytes=1 << 20)
    pair.run(3, missing=False).check()


@pytest.mark.interpret
def test_kernels():
    Pair(adam("fp32", "fp32", lr=0.01, backend="triton"), chunk_bytes=100_000).run(4).check()
    Pair(adam(*DYNAMIC, lr=0.01, backend="triton"), chunk_bytes=30_000).run(4).check()


def _groups(make):
    def build(given):
        exact = {"exp_avg": "fp32", "exp_avg_sq": "fp32", "max_exp_avg_sq": "fp32"}
        groups = [
            {"params": given[:2], "lr": 0.1},
            {"params": given[2:5], "formats": exact, "amsgrad": True},
            {"params": given[5:], "fused": True, "betas": (0.5, 0.9)},
        ]
        return make(groups)

    return build


def test_groups_of_different_formats(where):
    pair = Pair(_groups(adam(*DYNAMIC, lr=0.01)), chunk_bytes=30_000, **where).run(6)
    pair.check()
    for ours, optimizer in pair.each():
        optimizer.add_param_group({"params": [Parameter(torch.ones(99, 99))], "lr": 0.5})
        ours.append(optimizer.param_groups[-1]["params"][0])
        optimizer.param_groups[0]["lr"] = 0.001
    pair.run(4).check("a group more")


def test_hyperparameters_that_change_what_is_stored(where):
    """A moment more, and gradients that are centred, which forbids parts."""
    pair = Pair(adam(*DYNAMIC, lr=0.01), chunk_bytes=9000, **where).run(3)
    for key, value in (("amsgrad", True), ("centralization", 0.5), ("centralization", 0.0)):
        for _, optimizer in pair.each():
            optimizer.param_groups[0][key] = value
        pair.run(3).check(key)


def test_frozen_parameters(where):
    pair = Pair(adam(*DYNAMIC, lr=0.01), chunk_bytes=9000, **where)
    for frozen in ([0, 2], [], [1], range(len(SHAPES))):
        for ours in pair.params:
            for index, param in enumerate(ours):
                param.requires_grad_(index not in frozen)
        pair.run(2).check(str(frozen))


@pytest.mark.parametrize("fused", [False, True])
def test_found_inf_and_grad_scale(fused, where):
    pair = Pair(adam(*DYNAMIC, lr=0.01, fused=fused), chunk_bytes=9000, **where)
    for found in (0.0, 1.0, 0.0, 1.0, 0.0):
        for _, optimizer in pair.each():
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)
        pair.run(1).check(f"found_inf {found}")


def test_nonfinite_gradients_skip_the_step(where):
    pair = Pair(adam(*DYNAMIC, lr=0.01, skip_nonfinite=True), chunk_bytes=9000, **where).run(2)
    for ours, optimizer in pair.each():
        for param in ours:
            param.grad = torch.full_like(param, torch.nan)
        optimizer.step()
    pair.check("NaN")
    pair.run(2).check("after")


def test_closures_and_schedulers(where):
    pair = Pair(adam(*DYNAMIC, lr=0.1), chunk_bytes=9000, **where)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in pair.optimizers]
    losses = []
    for _ in range(4):
        for (ours, optimizer), scheduler in zip(pair.each(), schedulers, strict=True):

            def closure(ours=ours, optimizer=optimizer):
                optimizer.zero_grad()
                loss = sum((p * p).sum() for p in ours)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
            scheduler.step()
    assert losses[0::2] == losses[1::2]
    pair.check()


def test_state_that_was_there_moves(where):
    pair = Pair(adam(*DYNAMIC, lr=0.01), offloaded=False).run(3)
    offload(pair.optimizers[1], chunk_bytes=9000, **where)
    pair.check("before a step")
    pair.run(3).check("after it")


def test_the_former_module_name_has_the_same_objects():
    for name in places.__all__:
        assert getattr(places, name) is getattr(offloading, name)
