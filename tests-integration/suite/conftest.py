"""Skips what cannot run here, and prints the counts of the law suite at the end of a run."""

import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from optstate_codecs.triton_lib import HAS_TRITON, INTERPRETED

sys.path.insert(0, str(Path(__file__).parents[1]))

BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite-results", help="a JSON file to which the counts of the run go")
    parser.addoption("--suite-part", help="K/N: the K-th of N parts of the cases")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--suite-part", default=None)
    if part is None:
        return
    number, count = map(int, part.split("/"))
    if not 1 <= number <= count:
        raise pytest.UsageError(f"--suite-part={part}: must be K/N with K from 1 to N")
    chosen = [item for item in items if zlib.crc32(item.name.encode()) % count == number - 1]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.node.get_closest_marker("interpret") and not (HAS_TRITON and INTERPRETED):
        pytest.skip("needs triton and TRITON_INTERPRET=1")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print how many cases there were, and what does not apply."""
    from suite import report
    from suite.test_laws import ALL, CASES

    names = {case.name: case for case in CASES}
    outcomes = {}
    for outcome in ("passed", "failed", "skipped"):
        for found in terminalreporter.stats.get(outcome, ()):
            name = getattr(found, "nodeid", "").partition("::test_law[")[2].removesuffix("]")
            if name in names:
                outcomes[names[name]] = outcome
    if not outcomes:
        return
    counts, table = report.counts(outcomes), report.not_applicable(ALL)
    on_cpu = sum(case.point.device == "cpu" for case in CASES)
    terminalreporter.section("law suite")
    terminalreporter.write_line(
        f"{len(CASES)} cases apply, {on_cpu / len(CASES):.1%} of them on a CPU; in this run:"
    )
    for key, value in counts.items():
        terminalreporter.write_line(f"  {key}: {value}")
    path = config.getoption("--suite-results", default=None)
    if path is None:
        return
    terminalreporter.write_line("not applicable (cases, laws, condition, reason):")
    for row in table:
        terminalreporter.write_line(
            f"  {row['cases']:6}  {row['laws']}; {row['condition']}: {row['reason']}"
        )
    kind = "interpreter" if INTERPRETED else "gpu" if torch.cuda.is_available() else "cpu"
    part = config.getoption("--suite-part")
    run = {"setup": report.setup(), "seconds": round(time.monotonic() - BEGAN), **counts}
    applying = {"cases": len(CASES), "on a CPU": on_cpu}
    name = kind if part is None else f"{kind}, part {part}"
    report.write(Path(path), name, {**run, "that apply": applying}, table)
