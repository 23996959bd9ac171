"""A plugin of pytest that writes down a run: what ran, with which versions, and what was counted.

    python -m pytest -p run_results --run-results FILE.json --run-name NAME ...

needs this folder on PYTHONPATH. Tests count with ``record_property("kills", 100)``: the whole
numbers of all tests that passed are added up. A run replaces the one of the same name in the file.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed")
BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-results", help="a JSON file to which the counts of the run go")
    parser.addoption("--run-name", help="the name of the run in it")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Print the counts, and write them to the file."""
    stats = terminalreporter.stats
    counts: Counter[str] = Counter()
    for report in stats.get("passed", ()):
        counts.update({key: n for key, n in report.user_properties if isinstance(n, int)})
    outcomes = {name: len(stats[name]) for name in OUTCOMES if stats.get(name)}
    terminalreporter.section("counted")
    for key, value in sorted(counts.items()):
        terminalreporter.write_line(f"  {key}: {value}")
    path, name = config.getoption("--run-results"), config.getoption("--run-name")
    if path is None or not outcomes:
        return
    known = json.loads(Path(path).read_text()) if Path(path).exists() else {"runs": {}}
    run = {
        "setup": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "tests": sorted({_folder(arg) for arg in config.args}),
        "seconds": round(time.monotonic() - BEGAN),
        "outcomes": outcomes,
    }
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        run["ended early"] = True
    known["runs"][name or "run"] = run | (
        {"counts": dict(sorted(counts.items()))} if counts else {}
    )
    known["runs"] = dict(sorted(known["runs"].items()))
    Path(path).write_text(json.dumps(known, indent=2) + "\n")


def _folder(argument: str) -> str:
    """A path of the repository."""
    path = Path(argument).resolve()
    root = Path(__file__).resolve().parents[1]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
