"""FSDP2 and FSDP1 in two processes on the CPU: what works, and what is refused by name."""

import json
from pathlib import Path

import pytest
from processes import run_workers

WORKER = Path(__file__).parent / "fsdp_worker.py"
SHAPES = [[1], [1, 7], [7], [7, 33], [33], [33, 16]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("fsdp")
    run_workers(WORKER, [(rank, folder) for rank in range(2)], seconds=300)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_wrapped_optimizer_is_torchs_under_fsdp2(results) -> None:
    for result in results:
        found = result["fsdp2"]
        assert found["exact"] == 0.0
        # of how far parameters have moved
        assert 0.0 < found["coded"] < 0.2
        assert 0.0 < found["preset"] < 0.2
        assert found["checkpoint"]
        assert found["clipped"]
        assert found["released"]


def test_clipping_what_was_released_is_noticed_under_fsdp2(results) -> None:
    for result in results:
        assert "GradientRelease: " in result["fsdp2"]["clip"]
        assert "max_grad_norm=" in result["fsdp2"]["clip"]


def test_memory_is_that_of_the_shards(results) -> None:
    counts = [result["fsdp2"]["parameters"] for result in results]
    assert sum(counts) == 33 * 17 + 7 * 34 + 8
    assert counts[0] != counts[1]
    for result, count in zip(results, counts, strict=True):
        found = result["fsdp2"]
        assert found["bytes"] == found["expected bytes"]
        # six step counts of 4 bytes; FSDP2 pads parameters, some less than a row
        assert found["bytes"][2] == 8 * count + 24
        assert 4 * count <= found["bytes"][0] < 8 * count


def test_the_family_trains_under_fsdp2(results) -> None:
    """Also where a trainer shards the model after its optimizer was made."""
    for result in results:
        found = result["fsdp2"]
        assert found["exact family"] < 1e-6
        # of how far parameters have moved
        assert found["family"] < 0.1
        assert found["swapped"] < 0.1


def test_what_the_accumulator_advises_adds_in_float32(results) -> None:
    assert [result["accumulated"] for result in results] == [300.0, 300.0]


@pytest.mark.parametrize("kind", ["flat", "original"])
def test_fsdp1_trains_and_gathers_decoded_state_as_torchs(kind, results) -> None:
    for result in results:
        assert result[kind]["state"]
        assert result[kind]["resumed"]
        assert result[kind]["own"]


@pytest.mark.parametrize("kind", ["flat", "original"])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "TurboAdam", "offload"])
def test_fsdp1_is_refused_packed_state_on_every_worker(name, kind, results) -> None:
    for rank, result in enumerate(results):
        *messages, shapes = result[kind][name]
        for message in messages:
            assert message.startswith("RuntimeError: optim_state_dict: FSDP1 cannot gather packed")
            assert "optimizer.full_state_dict()" in message
            assert "use FSDP2 (fully_shard)" in message
        # which is gathered on every worker, or on the first
        assert shapes == SHAPES or rank


@pytest.mark.parametrize("kind", ["flat", "original"])
def test_fsdp1_is_told_of_shards_and_norms(kind, results) -> None:
    for result in results:
        (warning,) = result[kind]["warnings"]
        assert "is of this worker's shards only" in warning
        assert result[kind]["norm"].startswith("ValueError: max_grad_norm=1.0: must be None for")
