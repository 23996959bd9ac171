"""Lists of tensors rounded, or added and rounded: against draws taken one by one, on every path."""

import shutil

import pytest
import torch

from optstate_codecs.engine.cpu.choice import choice_of
from optstate_codecs.engine.cpu.rounding import rounding_choice
from optstate_codecs.rounding import Draw, stochastic_round_bf16
from optstate_codecs.stochastic import SOURCES, STREAM, round_
from optstate_codecs.triton_lib import core

# several tiles, tails of every kind, one element, none, no dimensions
SHAPES = ((64, 64), (61, 83), (4097,), (129,), (16,), (1,), (0,), ())
SEED = 2**40 + 7


def paths() -> list:
    interpreter = pytest.param("cpu", marks=pytest.mark.interpret, id="interpreter")
    cuda = pytest.param("cuda", marks=pytest.mark.cuda, id="cuda")
    return [pytest.param("cpu", id="torch"), interpreter, cuda]


@pytest.fixture
def compiled(monkeypatch, tmp_path_factory):
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setenv("OPTSTATE_BACKEND", "compile")
    choice_of.cache_clear()
    yield
    choice_of.cache_clear()


@pytest.mark.parametrize("add", [False, True], ids=["round", "add"])
@pytest.mark.parametrize("dtype", SOURCES, ids=str)
def test_compiled_kernels_draw_the_same(dtype: torch.dtype, add: bool, compiled) -> None:
    targets, sources = lists(dtype)
    sources[1][7, 7] = float("nan")
    numbers, counts = [3, 1, 4, 2**33, 5, 9, 2, 6], [0, 1, 2, 3, 2**31 - 1, 5, 6, 7]
    want = [expected(*items, add) for items in zip(targets, sources, numbers, counts, strict=True)]
    versions = [target._version for target in targets]
    round_(targets, sources, SEED, numbers, counts, add=add)
    for ours, theirs in zip(targets, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert all(t._version > v for t, v in zip(targets, versions, strict=True) if t.numel())
    choice = rounding_choice(dtype, add)
    assert dtype == torch.float16 or choice.kernel is not None


def lists(source: torch.dtype, shapes=SHAPES) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(s, generator=generator).bfloat16() for s in shapes]
    return targets, [torch.randn(s, generator=generator).to(source) for s in shapes]


def expected(target: torch.Tensor, source: torch.Tensor, number: int, count: int, add: bool):
    value = source.double().float() + (target.float() if add else 0.0)
    bits = Draw(SEED, count, number, STREAM).bits16(value.numel())
    return stochastic_round_bf16(value.reshape(-1), bits).view(value.shape)


@pytest.mark.parametrize("device", paths())
@pytest.mark.parametrize("add", [False, True], ids=["round", "add"])
@pytest.mark.parametrize("dtype", SOURCES, ids=str)
def test_every_element_draws_for_itself(dtype: torch.dtype, add: bool, device: str) -> None:
    targets, sources = lists(dtype)
    numbers, counts = [3, 1, 4, 2**33, 5, 9, 2, 6], [0, 1, 2, 3, 2**31 - 1, 5, 6, 7]
    want = [expected(*items, add) for items in zip(targets, sources, numbers, counts, strict=True)]
    got = [target.to(device) for target in targets]
    kept = [source.to(device) for source in sources]
    round_(got, kept, SEED, numbers, counts, add=add)
    for ours, theirs, kind in zip(got, want, zip(kept, sources, strict=True), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0)
        assert torch.equal(kind[0].cpu(), kind[1])


@pytest.mark.parametrize("device", paths())
def test_addresses_that_are_not_multiples_of_16_bytes(device: str) -> None:
    targets, sources = lists(torch.bfloat16, [(4103,)] * 3)
    got = [target.to(device) for target in targets]
    views = [got[0][1:4099], got[1][2:4100], got[2][8:4104]]
    given = [s.to(device)[5 : 5 + v.numel()] for s, v in zip(sources, views, strict=True)]
    want = [
        expected(v.cpu().clone(), s.cpu(), i, 1, True)
        for i, (v, s) in enumerate(zip(views, given, strict=True))
    ]
    round_(views, given, SEED, [0, 1, 2], [1, 1, 1], add=True)
    for target, before, ours, theirs in zip(got, targets, views, want, strict=True):
        assert torch.equal(ours.cpu(), theirs)
        assert torch.equal(target[0].cpu(), before[0])  # what lies beside is not touched
    assert torch.equal(got[0][4099:].cpu(), targets[0][4099:])


@pytest.mark.parametrize("device", paths())
def test_layouts_count_elements_in_the_targets_storage_order(device: str) -> None:
    shape = (3, 5, 7, 4)
    (target,), (source,) = lists(torch.float32, [shape])
    last = target.to(device).contiguous(memory_format=torch.channels_last)
    same = source.to(device).contiguous(memory_format=torch.channels_last)
    other = last.clone()
    strided = torch.zeros(3, 5, 7, 8, dtype=torch.bfloat16, device=device)[..., ::2]
    want = expected(
        target.permute(0, 2, 3, 1).contiguous(), source.permute(0, 2, 3, 1), 0, 1, True
    ).permute(0, 3, 1, 2)
    round_([last], [same], SEED, [0], [1], add=True)
    round_([other], [source.to(device)], SEED, [0], [1], add=True)
    strided.copy_(target)
    round_([strided], [source.to(device)], SEED, [0], [1], add=True)
    assert torch.equal(last.cpu(), want)
    assert torch.equal(other.cpu(), want)
    assert torch.equal(strided.cpu(), expected(target, source, 0, 1, True))


@pytest.mark.parametrize("device", paths())
def test_what_is_no_number_stays_so_and_nothing_else_becomes_infinite(device: str) -> None:
    inf, largest = float("inf"), torch.finfo(torch.bfloat16).max
    patterns = [0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0x7F80FFFF, -1, -0x7FFFFF]
    nan = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    kept = torch.tensor([0.0, -0.0, 2.0**-133, -(2.0**-133), largest, -largest, inf, -inf])
    near = torch.tensor([0x7F7F1000, 0x7F7F7FFF], dtype=torch.int32).view(torch.float32)
    beyond = torch.tensor([0x7F7F9000], dtype=torch.int32).view(torch.float32)
    source = torch.cat([nan, kept, near, beyond]).to(device)
    for count in range(8):
        target = torch.zeros(17, dtype=torch.bfloat16, device=device)
        round_([target], [source], SEED, [0], [count])
        got = target.cpu()
        assert torch.isnan(got[:6]).all()
        assert torch.equal(got[6:14].view(torch.int16), kept.bfloat16().view(torch.int16))
        assert torch.equal(got[14:].float(), torch.tensor([largest, largest, inf]))


@pytest.mark.parametrize("device", paths())
def test_autograd_sees_that_the_target_was_written(device: str) -> None:
    target = torch.ones(4096, dtype=torch.bfloat16, device=device)
    before = target._version
    round_([target], [torch.ones(4096, device=device)], SEED, [0], [1])
    assert target._version > before


@pytest.mark.cuda
def test_one_launch_for_all_and_only_tables_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    from optstate_codecs.engine.triton import rounding

    made = []
    original = rounding.launch
    monkeypatch.setattr(rounding, "launch", lambda *a: (made.append(1), original(*a)))
    targets, sources = ([t.cuda() for t in ts] for ts in lists(torch.bfloat16, [(1 << 20,)] * 4))
    for count in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        round_(targets, sources, SEED, [0, 1, 2, 3], [count] * 4, add=True)
        torch.cuda.synchronize()
    assert len(made) == 2
    assert torch.cuda.max_memory_allocated() - before <= 4096


def test_plain_torch_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "HAS_TRITON", True)
    for wanted, kernels in (("auto", True), ("triton", True), ("eager", False)):
        monkeypatch.setenv(core.BACKEND_VARIABLE, wanted)
        assert core.kernels_run(torch.device("cuda")) is kernels
