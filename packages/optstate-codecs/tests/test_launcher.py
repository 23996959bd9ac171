"""Launches without triton's search for the compiled kernel pass what triton itself passes.

Triton has a driver here whose kernels do nothing, so that no GPU is needed.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from subjects import FIRST, SECOND
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.engine import ResidentExecutor
from optstate_codecs.triton_lib import HAS_TRITON, INTERPRETED, tl

if HAS_TRITON:
    from triton.compiler.compiler import LazyDict

pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs compiled triton")

Launches = list[tuple[Any, ...]]


class Driver:
    """A GPU's driver, as far as triton calls it to compile and launch."""

    utils = property(lambda self: self)
    launcher_cls = property(lambda self: lambda *_: lambda *args: self.launches.append(args))

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.launches: Launches = []
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _: 0
        self.load_binary = lambda *_: (0, 1, 64, 0, 1024)
        self.unload_module = lambda *_: None
        self.get_device_properties = lambda _: {"max_shared_mem": 1 << 17}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    from triton.runtime import driver

    fake = Driver()
    driver.set_active(fake)
    monkeypatch.setattr(ResidentExecutor, "_uses_triton", lambda *_: True)
    yield fake.launches
    with suppress(RuntimeError):  # there is no GPU, so that there is no other driver
        driver.reset_active()


def test_steps_are_launched_as_triton_launches_them(launches: Launches, monkeypatch) -> None:
    from optstate_codecs.engine.triton.launcher import Launcher

    launch = Launcher.__call__
    searched = 0

    def twice(launcher: Launcher, *args: Any, **options: Any) -> None:
        """By triton, then as at the next step."""
        nonlocal searched
        before = len(launcher._compiled)
        launch(launcher, *args, **options)
        searched += len(launcher._compiled) - before
        launch(launcher, *args, **options)

    monkeypatch.setattr(Launcher, "__call__", twice)
    params = [Parameter(torch.zeros(n)) for n in (512, 33)]
    formats = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
    optimizer = CodedOptimizer(params, Adam(), formats)
    for step in range(4):
        for param in params:
            param.grad = torch.zeros_like(param)
        # changes which arguments are None
        optimizer.grad_scale = torch.ones(()) if step % 2 else None
        optimizer.step()
    assert len(launches) == 16
    for first, second in zip(launches[::2], launches[1::2], strict=True):
        assert len(first) == len(second) > 70
        for a, b in zip(first, second, strict=True):
            assert a is b or a == b or type(a) is type(b) is LazyDict
    # two buckets, with and without a scale
    assert searched == 4


def test_another_alignment_is_another_kernel(launches: Launches) -> None:
    from optstate_codecs.engine.triton.launcher import Launcher
    from optstate_codecs.engine.triton.means import means_kernel

    launcher = Launcher(means_kernel, {"COLUMNS": 4, "TYPE": tl.float32, "BF16": False})
    work, table, means = (torch.zeros(8, dtype=torch.int64) for _ in range(3))
    for shifted in (table, table[1:], table, table[1:]):
        launcher(2, [work, shifted, means], CHUNK=64)
    assert len(launches) == 4
    compiled = {id(found) for found, _ in launcher._compiled.values()}
    assert len(compiled) == 2
