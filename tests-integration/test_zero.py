"""Random numbers under ``ZeroRedundancyOptimizer``: two processes with a parameter each."""

import json
from pathlib import Path

import pytest
from processes import run_workers

WORKER = Path(__file__).parent / "zero_worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("zero")
    run_workers(WORKER, [(rank, folder) for rank in range(2)], seconds=120)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_without_keys_every_worker_draws_the_same(results) -> None:
    for result in results:
        assert result["plain"] == {"differ": False, "as alone": True, "resumed": True}


def test_a_key_for_each_worker_tells_them_apart(results) -> None:
    for result in results:
        assert result["keyed"] == {"differ": True, "as alone": True, "resumed": True}


def test_names_in_groups_tell_them_apart(results) -> None:
    assert all(result["named"] for result in results)
