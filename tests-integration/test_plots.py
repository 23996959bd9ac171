"""Plots of the docs are what the script makes from committed results, and follow both schemes."""

import json
import re
from pathlib import Path
from runpy import run_path
from typing import Any

import matplotlib
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
IMAGES = sorted(
    path
    for path in DOCS.rglob("*")
    # assets/ has the logo, which is on the header's colour in both schemes
    if path.suffix in (".svg", ".png", ".jpg") and path.parent.name != "assets"
)
# a picture of another version has the same words and numbers, but may lie elsewhere
PINNED = f"\nmatplotlib=={matplotlib.__version__} " in (ROOT / "constraints.txt").read_text()


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return run_path(str(ROOT / "benchmarks" / "plots.py"))


def words(svg: str) -> list[str]:
    """What is written in a picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_plots_are_what_the_results_give(script: dict[str, Any], tmp_path: Path) -> None:
    script["draw"](tmp_path)
    made = sorted(path for path in tmp_path.rglob("*.svg"))
    assert len(made) == len(script["PLOTS"]) > 3
    for path in made:
        drawn, committed = path.read_text(), (DOCS / path.relative_to(tmp_path)).read_text()
        assert words(drawn) == words(committed) != [], "run benchmarks/plots.py"
        if PINNED:
            assert drawn == committed, "run benchmarks/plots.py"


def test_plots_show_the_newest_row_of_each_optimizer(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = {"layout": "llama1b", "dtype": "bfloat16", "copy_share": 0.5, "whole_ms": 10.0}

    def report(file: str, day: str, milliseconds: dict[str, float]) -> None:
        rows = [
            {"optimizer": name, "device_ms": ms, "state_bits_per_parameter": 16.0, **same}
            for name, ms in milliseconds.items()
        ]
        failed = {"optimizer": "AdamW8bit", "error": "RuntimeError()", **same}
        text = json.dumps({"time": f"{day}T10:00:00+00:00", "rows": [*rows, failed]})
        (tmp_path / file).write_text(text)

    report("step_time_h200_new.json", "2026-12-02", {"AdamW8bit": 2.0, "torch fused": 5.0})
    report("step_time_h200.json", "2026-11-21", {"AdamW8bit": 3.0, "flashoptim": 9.0})
    report("step_time_h100.json", "2026-12-03", {"AdamW8bit": 4.0})
    monkeypatch.setitem(script["timings"].__globals__, "RESULTS", tmp_path)
    found = script["timings"]("h200")
    assert {name: row["ms"] for name, row in found.items()} == {
        **{"AdamW8bit": 2.0, "torch fused": 5.0, "flashoptim": 9.0},
    }
    # the bytes of this one were miscounted on that day
    assert {name for name, row in found.items() if "share" in row} == {"AdamW8bit", "torch fused"}


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_pictures_follow_light_and_dark(path: Path) -> None:
    svg = path.read_text()
    assert "@media(prefers-color-scheme:dark)" in svg
    style, _, drawing = svg.partition("</style>")
    # every colour outside the style is a variable that the style sets for both
    names = set(re.findall(r"var\(--(\w+)\)", drawing))
    light, _, dark = style.partition("@media")
    assert names
    assert all(f"--{name}:#" in scheme for name in names for scheme in (light, dark))
    assert not re.findall(r"(?:fill|stroke): ?#\w+", drawing)
    assert "<title>" in svg


def test_every_picture_is_in_a_page() -> None:
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *DOCS.rglob("*.md")])
    unused = {path.name for path in IMAGES if f"{path.name})" not in pages}
    assert unused == set()
