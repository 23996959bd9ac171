"""Runs the processes of a distributed test."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_workers(script: Path, arguments: Sequence[Sequence[object]], seconds: float) -> None:
    """Run a script once for each list of arguments, all at the same time; raise where one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, given)], stderr=subprocess.PIPE, env=environment
        )
        for given in arguments
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=seconds)
            assert worker.returncode == 0, errors.decode()[-3000:]
    finally:
        for worker in workers:
            # one would wait for the other
            worker.kill()
            worker.communicate()
