"""DTensors on several processes: FSDP2, HSDP, tensor parallelism, and checkpoints that reshard."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_workers

WORKER = Path(__file__).parent / "sharding_worker.py"
SECONDS = 600
SAVED = ("AdamW8bit", "AdamW4bit", "TurboAdam-3-4", "TurboAdam-flush", "split24")
COUNTS = {"cpu": (1, 2, 4), "cuda": (1, 2)}
#: whose stochastic writes draw by shard where rows are no multiples of 16 elements
ROUNDED = ("stochbf16.AdamW", "split24", "16 bits", "from the third step")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], ids=["gloo", "nccl"])
def device(request: pytest.FixtureRequest) -> str:
    """A worker for each process, or for each of two GPUs."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return str(request.param)


def run(work: str, workers: int, folder: Path, device: str) -> dict[Any, Any]:
    """What the first of several processes found."""
    arguments = [(work, rank, workers, folder, device) for rank in range(workers)]
    run_workers(WORKER, arguments, SECONDS)
    return torch.load(folder / f"{work}-{workers}.pt", weights_only=True)


def assert_same(name: str, ours: list[Any], theirs: list[Any]) -> None:
    """Equal bits, but for what is rounded at random by shard."""
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(mine, other, strict=True):
            row = mine[0].numel() // max(mine[0].shape[0], 1)
            if name in ROUNDED and row % 16:
                torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
            else:
                assert torch.equal(a, b), f"{name}: parameter {number}"


def test_bits_do_not_depend_on_the_number_of_workers(tmp_path: Path, device: str) -> None:
    found = {workers: run("steps", workers, tmp_path, device) for workers in COUNTS[device]}
    single = found.pop(1)
    every = sum(param.numel() for param in single["exact"])
    for workers, several in found.items():
        for name in set(single) - {"exact", "torch", "counted"}:
            assert_same(name, several[name], single[name])
        assert every // workers <= several["counted"] < every
    for results in (single, *found.values()):
        for ours, theirs in zip(results["exact"], results["torch"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_stores_and_snapshots_of_shards_are_as_resident_state(tmp_path: Path, device: str) -> None:
    found = run("stores", 2, tmp_path, device)
    for name in ("AdamW8bit", "TurboAdam"):
        for store in ("host", "disk"):
            assert_same(name, found[name, store], found[name, "resident"])
            assert found[name, store, "snapshot"]


def test_gradients_are_released_clipped_and_skipped_over_all_shards(
    tmp_path: Path, device: str
) -> None:
    found = run("released", 2, tmp_path, device)
    assert found["released"]
    assert found["skipped"]
    assert found["clipped"] < 1e-6
    assert found["norm"] == pytest.approx(1, rel=1e-5)


def test_other_placements(tmp_path: Path, device: str) -> None:
    two = run("placements", 2, tmp_path, device)
    four = run("placements", 4, tmp_path, device) if device == "cpu" else two
    for results in (two, four):
        for (kind, name), ours in ((k, v) for k, v in results.items() if k != "torch"):
            for (param, *_), theirs in zip(ours, results["torch"], strict=True):
                if name == "exact":
                    torch.testing.assert_close(param, theirs, rtol=1e-6, atol=1e-7)
                else:
                    # of four steps of a hundredth, with parameters of up to 4 in bfloat16
                    off = 0.03 if name not in ROUNDED else 0.06
                    assert (param - theirs).abs().max() < off, (kind, name)
    for name in {name for key in two if key != "torch" for name in key[1:]}:
        # blocks of columns are as long as a worker's part of a row
        for kind in ("rows", "replicas", *["columns"] * (name == "exact")):
            assert_same(name, four[kind, name], two[kind, name])
        if device == "cpu":
            assert_same(name, four["hybrid", name], two["rows", name])


def test_what_cannot_be_stepped_is_refused_by_name(tmp_path: Path, device: str) -> None:
    found = run("refusals", 2, tmp_path, device)
    assert "params[0]: is a DTensor with placements (P" in found["partial"]
    assert "must be sharded or replicated" in found["partial"]
    assert "ValueError: formats['exp_avg_sq']='linear4(" in found["rank1"]
    assert "needs the whole tensor" in found["rank1"]
    assert found["unchanged"]
    assert "state['exp_avg_codes']: size mismatch: shape (64, 128)" in found["foreign"]
    assert found["swapped"] == 1.0


def test_checkpoints_of_two_workers_go_on_with_other_numbers(tmp_path: Path, device: str) -> None:
    saved = run("saving", 2, tmp_path, device)
    for name in SAVED:
        assert_same(name, saved[name, "by rank"], saved[name, "continued"])
    for workers in {"cpu": (1, 3, 4), "cuda": (1, 2)}[device]:
        loaded = run("loading", workers, tmp_path, device)
        for key, ours in loaded.items():
            if key[0] == "from torch":
                for mine, theirs in zip(ours, saved["torch"], strict=True):
                    for a, b in zip(mine, theirs.values(), strict=True):
                        limit = 0 if key[1] == "exact" else 0.2 * float(b.abs().max())
                        torch.testing.assert_close(a, b, rtol=0, atol=limit)
            elif key[0] == "back":
                for mine, theirs in zip(ours, loaded["from torch", key[1]], strict=True):
                    assert all(map(torch.equal, mine, theirs))
            elif key[1] in ("single", "of single", "single's"):
                continue
            else:
                name, _, when = key
                assert_same(name, ours, saved[name, when])
        for name in SAVED:
            pairs = [(loaded[name, "single"], saved[name, "saved"])]
            pairs.append((loaded[name, "of single"], loaded[name, "single's"]))
            # decoded and encoded anew, with blocks of other lengths; levels of second moments are a
            # factor of four apart with 3 bits
            limit = 0.8 if name == "TurboAdam-flush" else 0.4
            for ours, theirs in pairs:
                for mine, other in zip(ours, theirs, strict=True):
                    for a, b in zip(mine[2:], other[2:], strict=True):
                        assert (a - b).norm() <= limit * b.norm(), name


def test_wrapped_optimizers_compute_the_same_bits_on_any_number_of_workers(
    tmp_path: Path, device: str
) -> None:
    found = {workers: run("wrapped", workers, tmp_path, device) for workers in COUNTS[device]}
    single = found.pop(1)
    for several in found.values():
        for name, ours in several.items():
            assert_same(name, ours, single[name])
    for name, ours in single.items():
        # a weight, three of whose rows are no multiple of a block
        assert torch.equal(ours[0][2], single["exact"][0][2]) == (name == "exact")


def test_packed_checkpoints_of_wrapped_optimizers_go_on_with_other_numbers(
    tmp_path: Path, device: str
) -> None:
    saved = run("wrapped_saving", 2, tmp_path, device)
    for workers in {"cpu": (1, 2, 4), "cuda": (1, 2)}[device]:
        loaded = run("wrapped_loading", workers, tmp_path, device)
        for (name, _, when), ours in loaded.items():
            if when == "message":
                # each worker's own is never another's
                refused = "Missing key in checkpoint state_dict" in ours
                assert refused if workers != 2 else ours == "nothing raised", (name, ours)
            else:
                assert_same(name, ours, saved[name, when])


def test_packed_state_of_wrapped_optimizers_in_other_placements(
    tmp_path: Path, device: str
) -> None:
    for workers in {"cpu": (2, 4), "cuda": (2,)}[device]:
        found = run("wrapped_placements", workers, tmp_path, device)
        for (name, kind, other, when), ours in found.items():
            expected = {"loaded": "expected", "continued": "went on"}.get(when, when)
            theirs = found[name, kind, kind, expected]
            if kind == other:
                assert_same(name, ours, theirs)
                continue
            for mine, those in zip(ours, theirs, strict=True):
                # encoded anew where blocks have other lengths, and then drawn otherwise
                limit = 0.05 if name == "8 bits" else 0.5
                for a, b in zip(mine, those, strict=True):
                    assert (a - b).norm() <= limit * b.norm(), (name, kind, other, when)
                assert torch.equal(mine[1], those[1])
