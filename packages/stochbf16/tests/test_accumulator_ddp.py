"""The accumulator under DistributedDataParallel: two processes, against sums in float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "ddp_worker.py"


@pytest.fixture(
    scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.cuda, id="nccl")]
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    backend: str = request.param
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    folder = tmp_path_factory.mktemp(backend)
    commands = [[sys.executable, str(WORKER), str(rank), str(folder), backend] for rank in range(2)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors.decode()[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("to_none", [False, True], ids=["zeroed", "none"])
@pytest.mark.parametrize("sync", ["every", "last"])
@pytest.mark.parametrize("view", [False, True], ids=["copied", "bucket_view"])
def test_workers_average_their_sums(results: list[dict], view, sync, to_none) -> None:
    for result in results:
        ours = result[f"{view} {sync} {to_none} True"]
        nearest = result[f"{view} {sync} {to_none} False"]
        assert ours["same"]
        # of each round: 31 or 32 additions, the first gradients being stored where there is no sum;
        # all three sums at once, but one by one in backwards that reduce
        first = 0 if to_none else 1
        reducing = 31 if sync == "every" else 1
        more = 3 if sync == "every" else 1
        expected = 3 * reducing + 31 - reducing
        assert ours["launches"] == [expected, expected + first * more]
        assert len(ours["found"]) == 6
        for vector in ours["found"]:
            assert abs(vector["bias"]) < 0.02
            assert vector["most"] < 0.15
        assert abs(ours["found"][0]["bias"]) < 3e-3
        # nearest rounding has lost what came after the first: hooks that did nothing would show
        assert nearest["found"][0]["bias"] < -0.05
