"""The benchmark scripts run and write what they say."""

import csv
import subprocess
import sys
from pathlib import Path


def test_step_time_appends_rows(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "step_time.csv"
    command = [sys.executable, root / "benchmarks" / "step_time.py", "--size", "64"]
    for _ in range(2):
        subprocess.run([*command, "--repeats", "3", "--out", out], check=True, capture_output=True)
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["optimizer"] for row in rows[:4]] == [row["optimizer"] for row in rows[4:]]
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
    measured = {row["optimizer"]: float(row["state_bytes_per_parameter"]) for row in rows}
    assert 8 <= measured["torch.optim.AdamW"] < 8.01
    assert 2 <= measured["lowbit_adam.AdamW8bit"] < 2.01
