"""The benchmark scripts run and write what they say."""

import json
import subprocess
import sys
from pathlib import Path
from runpy import run_path


def test_step_time_writes_times_and_bytes(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "step_time.json"
    command = [sys.executable, root / "benchmarks" / "step_time.py", "--out", out]
    sizes = ["--layout", "tiny", "--dtype", "float32", "--repeats", "3", "--device", "cpu"]
    names = ["--only", "torch fused", "--only", "AdamW8bit"]
    subprocess.run([*command, *sizes, *names], check=True, capture_output=True)
    report = json.loads(out.read_text())
    rows = {row["optimizer"]: row for row in report["rows"]}
    assert set(rows) == {"torch fused", "AdamW8bit"} <= set(report["versions"])
    for row in rows.values():
        assert 0 < row["host_ms"] <= row["whole_ms"]
    # beside the moments: a step count for each tensor, scales of shorter blocks
    assert 64 <= rows["torch fused"]["state_bits_per_parameter"] < 64.1
    assert 16 <= rows["AdamW8bit"]["state_bits_per_parameter"] < 16.4


def test_fidelity_8bit_writes_rows_and_setup(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "fidelity_8bit.json"
    command = [sys.executable, root / "benchmarks" / "fidelity_8bit.py", "--out", out]
    sizes = ["--steps", "3", "--last", "2", "--numel", "300"]
    subprocess.run([*command, *sizes], check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert result["setup"]["steps"] == 3
    assert len(result["rows"]) == 9 * len(result["setup"]["formats"])
    for row in result["rows"]:
        assert row["longest"] > 0.5
        if row["arrangement"] == "exact":
            assert (row["gain"], row["error"]) == (1, 0)
        else:
            assert abs(row["gain"] - 1) < 0.1
            assert 0 < row["error"] < 0.5


def test_docs_quote_the_fidelity_that_was_measured(root: Path) -> None:
    script = run_path(str(root / "benchmarks" / "fidelity_8bit.py"))
    rows = json.loads(script["RESULTS"].read_text())["rows"]
    page = (root / "docs" / "concepts" / "rounding.md").read_text()
    for kind in script["GRADIENTS"]:
        assert script["table"](rows, kind) in page
