"""The table, the JSON and the picture say what the runs say."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from optstate.demo.compare import Comparison, short, steps_per_second
from optstate.demo.plot import png, smoothed
from optstate.demo.record import Run
from optstate.demo.report import table, to_json

WIDTH = 80


def printed(comparison: Comparison) -> str:
    out = StringIO()
    Console(width=WIDTH, file=out).print(table(comparison))
    return out.getvalue()


def row(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
    return line.split()


def test_table_shows_the_runs(comparison: Comparison) -> None:
    adamw, sgd = comparison.runs
    cells = row(printed(comparison), "AdamW")
    assert cells[1:4] == [f"{adamw.train_loss:.4f}", f"{adamw.validation_loss:.4f}", "-"]
    assert cells[4:6] == [f"{adamw.state_bytes_per_parameter:.3f}", "-"]
    cells = row(printed(comparison), "SGD")
    difference = 100 * (sgd.validation_loss - adamw.validation_loss) / adamw.validation_loss
    assert cells[3] == f"{difference:+.2f}%"
    assert cells[4:6] == ["0.000", "0.0%"]


def test_table_fits_into_80_columns(comparison: Comparison) -> None:
    assert "\u2026" not in printed(comparison)
    assert max(map(len, printed(comparison).splitlines())) <= WIDTH


def test_bytes_are_those_of_the_tensors(comparison: Comparison) -> None:
    adamw, sgd = comparison.runs
    assert adamw.memory is not None
    assert sgd.memory is not None
    size = 4 * adamw.parameters
    assert (adamw.memory.parameters, adamw.memory.gradients) == (size, size)
    # Two moments for each parameter, and one step count for each of the 13 tensors.
    assert adamw.memory.state == 2 * size + 4 * 13
    assert sgd.memory.state == 0
    assert adamw.memory.counted == 4 * size + 4 * 13


def test_json_is_complete_and_valid(comparison: Comparison) -> None:
    result = json.loads(to_json(comparison))
    assert result["baseline"] == "torch.optim.AdamW"
    assert result["settings"]["steps"] == comparison.settings.steps
    for entry, run in zip(result["runs"], comparison.runs, strict=True):
        assert entry["train_curve"] == run.train
        assert entry["validation_loss"] == run.validation_loss
        assert entry["memory"]["state"] == run.memory.state


def test_a_diverged_run_is_still_valid_json(comparison: Comparison) -> None:
    broken = replace(comparison.runs[1], train=[1.0, float("nan")], validation=[(2, float("inf"))])
    text = to_json(replace(comparison, runs=(comparison.runs[0], broken)))
    entry = json.loads(text, parse_constant=pytest.fail)["runs"][1]
    assert entry["train_curve"] == [1.0, None]
    assert entry["validation_loss"] is None


def test_picture_is_a_png_of_readable_size(comparison: Comparison) -> None:
    header = png(comparison)[:24]
    assert header.startswith(b"\x89PNG")
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
    assert width > 1000
    assert height > 400


def test_smoothing_starts_unbiased() -> None:
    assert smoothed([4.0]) == [pytest.approx(4.0)]
    assert smoothed([4.0, 4.0, 4.0]) == [pytest.approx(4.0)] * 3
    assert smoothed([0.0] * 5 + [1.0])[-1] < 0.3


def test_speed_is_of_the_last_steps() -> None:
    assert steps_per_second(Run("made up", step_ms=[1e6, 100.0, 100.0]), recent=2) == 10.0


def test_short_name() -> None:
    assert short("lowbit_adam.AdamW8bit") == "AdamW8bit"
    assert short("torch.optim.AdamW") == "AdamW"
    assert short("stochbf16.AdamW") == "stochbf16.AdamW"
