"""When a CPU kernel is built and used, and that a run has the same bits whatever is chosen."""

import re
import shutil
import time
import warnings

import pytest

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.engine.cpu import choice, kernels
from optstate_codecs.testing import Trainer
from optstate_codecs.testing.subject import assert_same

FORMATS = {
    "exp_avg": "dynamic8(block_size=64, rounding=stochastic, units=update)",
    "exp_avg_sq": "dynamic8(block_size=64, signed=False, domain=sqrt, rounding=stochastic)",
}
SHAPES = ((61, 83), (129,), ())

SAME = choice.same_roundings()
NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("OPTSTATE_BACKEND", raising=False)
    monkeypatch.setattr(choice, "_warned", set())
    # on every processor, so that costs choose
    monkeypatch.setattr(choice, "same_roundings", lambda: True)
    forget()
    yield
    forget()


def forget() -> None:
    """As in another process."""
    kernels.compiled_kernel.cache_clear()
    choice.choice_of.cache_clear()


def trainer(backend: str = "auto", **options) -> Trainer:
    def make(params):
        return CodedOptimizer(params, Adam(), FORMATS, backend=backend, **options)

    return Trainer(make, SHAPES)


def by_kernels(trained: Trainer) -> set[bool]:
    param_steps = trained.optimizer.stored_param_steps()
    return set(trained.optimizer.executor.compiled.stepped_by_kernels(param_steps))


@pytest.fixture
def slow_reference(monkeypatch):
    """A reference that seems to take half a second a step, though it is quick for an element."""
    real = choice.KernelChoice.spent
    monkeypatch.setattr(
        choice.KernelChoice, "spent", lambda self, seconds, elements: real(self, 0.5, 10**9)
    )


def test_short_runs_look_for_nothing(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(choice, "LOOK_SECONDS", 60.0)
    monkeypatch.setattr(choice, "source", asked.append)
    assert by_kernels(trainer().run(3)) == {False}
    assert asked == []


@NEEDS_COMPILER
@pytest.mark.skipif(not SAME, reason="torch rounds the ends of tensors otherwise here")
def test_a_kernel_is_built_in_the_background_and_changes_no_bit(slow_reference) -> None:
    expected, ours = trainer("eager"), trainer()
    seen, end = [], time.monotonic() + 120
    while True:
        expected.run(1)
        ours.run(1)
        assert_same("auto", expected.tensors(), ours.tensors())
        seen.append(by_kernels(ours) == {True})
        if seen[-1] or time.monotonic() > end:
            break
    assert seen[:2] == [False, False]
    assert seen[-1]
    assert_same("auto", expected.run(2).tensors(), ours.run(2).tensors())


@NEEDS_COMPILER
@pytest.mark.skipif(not SAME, reason="torch rounds the ends of tensors otherwise here")
def test_built_kernels_are_used_at_once_and_by_resumed_runs(monkeypatch) -> None:
    monkeypatch.setattr(choice, "LOOK_SECONDS", 0.0)
    trainer("compile").run(1)
    forget()
    expected = trainer("eager").run(4)
    ours = trainer("eager").run(2)
    resumed = trainer()
    resumed.optimizer.load_state_dict(ours.optimizer.state_dict())
    for param, saved in zip(resumed.params, ours.params, strict=True):
        param.data.copy_(saved.data)
    resumed.time = ours.time
    assert_same("resumed", expected.tensors(), resumed.run(2).tensors())
    assert by_kernels(resumed) == {True}


@NEEDS_COMPILER
def test_nobody_waits_longer_than_the_reference_takes(monkeypatch) -> None:
    """Where one step of the reference takes longer than a build, the build comes first."""
    monkeypatch.setattr(choice, "SECONDS_PER_ELEMENT", 1.0)
    assert by_kernels(trainer().run(1)) == {True}


def test_kernels_with_other_bits_are_not_used(monkeypatch) -> None:
    monkeypatch.setattr(choice, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(choice, "find", lambda source: lambda *arguments: None)
    ours, expected = trainer(), trainer("eager").run(3)
    with pytest.warns(RuntimeWarning, match="gives other bits than the reference"):
        ours.run(1)
    assert_same("auto", expected.tensors(), ours.run(2).tensors())
    assert by_kernels(ours) == {False}


@NEEDS_COMPILER
@pytest.mark.parametrize(("large", "expected"), [(1, {True}), (10**9, {False})])
def test_where_roundings_differ_the_size_chooses_once(monkeypatch, large, expected) -> None:
    """The choice is the same in a resumed run, and for each part of a step."""
    monkeypatch.setattr(choice, "same_roundings", lambda: False)
    monkeypatch.setattr(choice, "LARGE", large)
    monkeypatch.setattr(choice, "SECONDS_PER_ELEMENT", 1.0)
    assert by_kernels(trainer().run(2)) == expected


def test_without_a_compiler_there_is_one_warning(monkeypatch, slow_reference) -> None:
    monkeypatch.setenv("CXX", "false")
    ours, end = trainer(), time.monotonic() + 120
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while not caught and time.monotonic() < end:
            ours.run(1)
    (warning,) = caught
    assert re.match(r"no working C\+\+ compiler .*set CXX", str(warning.message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.run(2)
        trainer().run(3)
    assert_same("auto", trainer("eager").run(ours.time).tensors(), ours.tensors())
