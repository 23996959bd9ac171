"""The counts of a run of the suite: printed, and written to a file for the documentation."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from suite.cases import Case, excluded
from suite.exclusions import EXCLUSIONS

__all__ = ["counts", "not_applicable", "setup", "write"]

AXES = ("dtype", "backend", "store", "layout", "device")


def counts(outcomes: Mapping[Case, str]) -> dict[str, Any]:
    """How many cases had which outcome, in all and by law and axis."""
    by_axis = {axis: Counter(getattr(case.point, axis) for case in outcomes) for axis in AXES}
    return {
        "cases": len(outcomes),
        "on a CPU": sum(case.point.device == "cpu" for case in outcomes),
        "outcomes": dict(sorted(Counter(outcomes.values()).items())),
        "optimizers": len({case.configuration.public.name for case in outcomes}),
        "configurations": len({case.configuration.name for case in outcomes}),
        "laws": dict(sorted(Counter(case.law.__name__ for case in outcomes).items())),
        **{axis: dict(sorted(found.items())) for axis, found in by_axis.items()},
    }


def not_applicable(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """The table of exclusions, with the number of cases of each."""
    found = Counter(excluded(case) for case in cases)
    return [
        {
            "laws": entry.shown or entry.laws.replace("*", "all"),
            "condition": entry.condition,
            "reason": entry.reason,
            "cases": found[entry],
        }
        for entry in EXCLUSIONS
    ]


def setup() -> dict[str, Any]:
    """The machine and the versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(path: Path, kind: str, run: Mapping[str, Any], table: list[dict[str, Any]]) -> None:
    """Add the counts of one kind of run to a file; a whole run replaces the parts of its kind."""
    known = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    parts = [name for name in known["runs"] if name.startswith(f"{kind}, part")]
    for name in parts:
        del known["runs"][name]
    known["runs"][kind] = run
    known["not applicable"] = table
    path.write_text(json.dumps(known, indent=2) + "\n")
