"""Timings, CSV, the picture, and gradient checkpointing."""

import csv

import pytest
import torch
from torch import nn

from optstate_wrap import (
    MetricsWriter,
    WarmupPolicy,
    checkpoint_sequential_modules,
    enable_gradient_checkpointing,
    plot_memory,
    wrap,
)


def test_rows_have_the_columns_and_times_add_up(problem, tmp_path) -> None:
    run = problem(
        lambda groups: wrap(torch.optim.AdamW(groups), WarmupPolicy(2), profile=True),
        shapes=((80, 80), (3,)),
    )
    for name in ("first", "second"):
        with MetricsWriter(tmp_path / "run.csv", name) as metrics:
            for step in range(2):
                run.run(1)
                metrics.write(run.optimizer, step, loss=0.5)
    rows = list(csv.DictReader((tmp_path / "run.csv").read_text().splitlines()))
    wanted = (
        "run step loss accuracy val_accuracy step_time_ms tensor_mem_mb materialize_ms "
        "inner_step_ms commit_ms overhead_ms cpu_mem_mb gpu_mem_mb gpu_peak_mb compression_active"
    )
    assert list(rows[0]) == wanted.split()
    assert [row["run"] for row in rows] == ["first", "first", "second", "second"]
    assert [row["compression_active"] for row in rows] == ["0", "1", "1", "1"]
    assert float(rows[3]["tensor_mem_mb"]) < float(rows[0]["tensor_mem_mb"])
    assert rows[0]["accuracy"] == ""
    timings = run.optimizer.last_step_timings
    parts = [value for key, value in timings.items() if key != "step_time_ms"]
    assert sum(parts) == pytest.approx(timings["step_time_ms"])


def test_no_timings_unless_asked_for(problem) -> None:
    run = problem(lambda groups: wrap(torch.optim.AdamW(groups))).run(1)
    assert run.optimizer.last_step_timings == {}


def test_report_counts_what_is_stored(problem) -> None:
    for store in ("device", "host"):
        run = problem(
            lambda groups, s=store: wrap(torch.optim.AdamW(groups), WarmupPolicy(0), store=s),
            shapes=((128, 128), (64,)),
        ).run(1)
        report = run.optimizer.memory_report()
        numel, small = 128 * 128, 64
        steps = 2 * 4
        assert report.parameters == numel + small
        assert report.plain_state_bytes == 8 * (numel + small) + steps
        int8 = numel + 4 * numel // 256
        assert report.state_bytes == int8 + 4 * numel + 8 * small + steps
        assert 0.3 < report.saved < 0.4


def test_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.png"
    plot_memory({"AdamW": 8e6, "int8": [1e6, 5e6]}, path, "state")
    assert path.read_bytes().startswith(b"\x89PNG")
    plot_memory({"AdamW": 8e6}, path.with_suffix(".svg"))
    assert "<svg" in path.with_suffix(".svg").read_text()


def test_gradient_checkpointing_is_enabled_where_a_model_has_it() -> None:
    class Model(nn.Linear):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            self.seen = gradient_checkpointing_kwargs

    model = Model(2, 2)
    assert enable_gradient_checkpointing(model)
    assert model.seen == {"use_reentrant": False}
    assert not enable_gradient_checkpointing(nn.Linear(2, 2))


def test_checkpointed_modules_give_the_same_gradients() -> None:
    modules = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)])
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    modules(x).sum().backward()
    grads = [p.grad.clone() for p in modules.parameters()]
    modules.zero_grad()
    checkpoint_sequential_modules(modules, 2, x).sum().backward()
    assert all(map(torch.equal, grads, (p.grad for p in modules.parameters())))
    with pytest.raises(ValueError, match="segments=9: must be from 1 to 4"):
        checkpoint_sequential_modules(modules, 9, x)
