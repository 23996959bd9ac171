"""Times of optimizer steps: what is measured, shown and refused; how long is no test's matter."""

import json
from pathlib import Path

import pytest
from commands import json_of, run

SMALL = ("bench", "5k", "--repeats", "2", "--device", "cpu", "--dtype", "float32")
TWO = ("--optimizer", "torch fused", "--optimizer", "AdamW8bit(block_size=256)")


def test_rows_have_times_bytes_and_shares(tmp_path: Path) -> None:
    report = json_of(*SMALL, *TWO, "--out", tmp_path / "new" / "bench.json")
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == report
    assert (report["model"], report["parameters"], report["dtype"]) == ("5k", 5000, "float32")
    fused, ours = report["rows"]
    assert (fused["optimizer"], ours["optimizer"]) == ("torch fused", "AdamW8bit(block_size=256)")
    # parameter, gradient and two moments read; parameter and moments written; and step counts
    assert fused["bytes_per_parameter"] == pytest.approx(4 * 7, rel=0.01)
    assert ours["state_bits_per_parameter"] == pytest.approx(16 + 2 * 32 / 256, rel=0.01)
    for row in report["rows"]:
        assert 1 <= row["repeats"] <= 2
        assert 0 < row["host_ms"] <= row["whole_ms"]
        bandwidth = row["moved_bytes"] / row["device_ms"] / 1e6
        assert row["copy_share"] * report["copy_bandwidth_gb_s"] == pytest.approx(bandwidth)


def test_the_table_has_what_was_measured() -> None:
    code, output = run(*SMALL, *TWO)
    assert code == 0
    assert "torch fused: " in output  # the progress where there is no terminal
    (line,) = (part for part in output.split("AdamW8bit(block_size=256) ")[1:] if "%" in part)
    # 4900 elements in 20 blocks of 256 and 100 in one, with two float32 scales each
    assert float(line.split()[5]) == pytest.approx(16 + 2 * 32 * 21 / 5000, abs=0.05)


def test_a_failure_is_reported_beside_the_others() -> None:
    code, output = run(*SMALL, *TWO[:2], "--optimizer", "torch.optim.SparseAdam")
    assert code == 2
    assert "cannot be used as Class(params, lr=0.001)" in output


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["lama"], "MODEL: 'lama': no model"),
        (["5k", "--optimizer", "Adamant"], "'Adamant': no such optimizer"),
        (["5k", "--optimizer", "flashoptim"], "'flashoptim': needs flashoptim, which is not"),
        (["5k", "--device", "toaster"], "'toaster': must be cpu, cuda or cuda:N"),
        (["5k", "--repeats", "0"], "--repeats"),
        (["5k", "--seconds", "-1"], "--seconds"),
        (["5k", "--out", "."], "is a folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_print_usage(args: list[str], complaint: str) -> None:
    code, output = run("bench", *args)
    assert code == 2
    assert "Usage: optstate bench" in output
    assert complaint in output
