"""Random numbers under ``ZeroRedundancyOptimizer``: two processes with a parameter each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "zero_worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("zero")
    commands = [[sys.executable, str(WORKER), str(rank), str(folder)] for rank in range(2)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors.decode()[-2000:]
    finally:
        for worker in workers:
            # one would wait for the other
            worker.kill()
            worker.communicate()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_without_keys_every_worker_draws_the_same(results) -> None:
    for result in results:
        assert result["plain"] == {"differ": False, "as alone": True, "resumed": True}


def test_a_key_for_each_worker_tells_them_apart(results) -> None:
    for result in results:
        assert result["keyed"] == {"differ": True, "as alone": True, "resumed": True}


def test_names_in_groups_tell_them_apart(results) -> None:
    assert all(result["named"] for result in results)
