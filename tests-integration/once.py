"""What the processes that run the tests make once for all of them."""

import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pytest


def made_once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None], seconds: float = 600
) -> Path:
    """A folder that the first of the processes that run the tests fills, while others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    outcome = folder.with_suffix(".outcome")
    try:
        folder.mkdir()
    except FileExistsError:
        end = monotonic() + seconds
        while not outcome.exists() and monotonic() < end:
            sleep(0.1)
        if not outcome.exists() or outcome.read_text() != "made":
            pytest.fail(f"{name}: could not be made by another process")
        return folder
    result = "failed"
    try:
        make(folder)
        result = "made"
    finally:
        part = folder.with_suffix(".part")
        part.write_text(result)
        part.rename(outcome)
    return folder
