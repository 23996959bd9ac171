"""Tables of the docs are whole, and those of offloaded state show what their heads say."""

import re
from itertools import count
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("docs/**/*.md", "*.md", "packages/*/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)


def cells(line: str) -> list[str]:
    """Of one line of a table; a bar inside code or behind a backslash is no border."""
    plain = re.sub(r"`[^`]*`", lambda code: code.group().replace("|", "/"), line)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", plain.strip().strip("|"))]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page, in lines of cells, without the rule below the head."""
    found: list[list[list[str]]] = []
    inside = code = False
    for line in text.splitlines():
        code ^= line.lstrip().startswith("```")
        row = line.startswith("|") and not code
        if row and not inside:
            found.append([])
        if row:
            found[-1].append(cells(line))
        inside = row
    return found


def test_there_are_tables() -> None:
    counts = {path.name: len(tables(path.read_text())) for path in PAGES}
    assert counts["benchmarks-raw.md"] > 10
    assert sum(counts.values()) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_have_as_many_cells_as_the_head(page: Path) -> None:
    for head, rule, *rows in tables(page.read_text()):
        assert all(re.fullmatch(":?-{3,}:?", cell) for cell in rule)
        assert {len(row) for row in (head, rule, *rows)} == {len(head)}, head


# what heads each column of figures: the key of the results, and in what unit it is shown
COLUMNS: dict[str, dict[str, tuple[str, float]]] = {
    "steps": {
        "ms": ("ms", 1),
        "floor ms": ("floor_ms", 1),
        "times the floor": ("times_floor", 1),
        "returns after ms": ("issued_ms", 1),
        "more on the device, MiB": ("extra_device_bytes", 2**20),
        "host bytes/param": ("host_bytes_per_parameter", 1),
    },
    "streamed": {
        "bytes/param": ("host_bytes_per_parameter", 1),
        "floor ms": ("floor_ms", 1),
        "ms": ("ms", 1),
        "times the floor": ("times_floor", 1),
    },
    "training": {
        "ms": ("ms", 1),
        "times `AdamW8bit`": ("times_resident", 1),
        "most on the device, GB": ("peak_bytes", 1e9),
        "host bytes/param": ("host_bytes_per_parameter", 1),
    },
    "finetuned": {
        "ms": ("ms", 1),
        "forward and backward alone, ms": ("ms_without_optimizer", 1),
        "most on the device, GB": ("peak_bytes", 1e9),
        "without an optimizer, GB": ("peak_bytes_without_optimizer", 1e9),
        "state on the host, GB": ("host_bytes", 1e9),
    },
    "on_disk": {
        "ms": ("ms", 1),
        "GB/s each way": ("gb_s_each_way", 1),
        "file bytes/param": ("file_bytes_per_parameter", 1),
    },
}


def report_of(columns: dict[str, tuple[str, float]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A part of a report in which no figure is there twice."""
    numbers = count(11)
    rows = [
        {"optimizer": f"{name} offloaded", "dtype": "bfloat16", "place": "host", "tokens": 4096}
        | {"released": name == "int8", "sync": name == "int8"}
        | {key: next(numbers) * unit for key, unit in columns.values()}
        for name in ("exact", "int8")
    ]
    return {"setup": {"versions": {}}, "result": rows}, rows


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_show_what_their_heads_say(name: str) -> None:
    page = run_path(str(ROOT / "benchmarks" / "offload_page.py"))
    report, rows = report_of(COLUMNS[name])
    ((head, _, *lines),) = tables(page[name](report))
    texts = {"optimizer", "parameters", "state on", "state", "tokens", "gradients", "`sync`"}
    assert [column for column in head if column not in texts] == list(COLUMNS[name])
    for line, row in zip(lines, rows, strict=True):
        shown = dict(zip(head, line, strict=True))
        for column, (key, unit) in COLUMNS[name].items():
            assert float(shown[column]) == row[key] / unit, column


def test_a_column_that_nothing_was_measured_for_is_left_out() -> None:
    page = run_path(str(ROOT / "benchmarks" / "offload_page.py"))
    report, rows = report_of(COLUMNS["training"])
    for row in rows:
        del row["peak_bytes"]
    ((head, *lines),) = tables(page["training"](report))
    assert "most on the device, GB" not in head
    assert {len(line) for line in lines} == {len(head)}
    assert head[-1] == "host bytes/param"
    assert float(lines[-1][-1]) == rows[-1]["host_bytes_per_parameter"]
