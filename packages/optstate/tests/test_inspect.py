"""What is said about checkpoints, against the optimizers that they are of."""

import lzma
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from commands import json_of, run
from torch.distributed.checkpoint.state_dict import get_state_dict

from lowbit_adam import AdamW4bit, AdamW8bit
from optstate_codecs import offload, save_safetensors, state_bytes, synchronize

PEERS = Path(__file__).parent / "peers"
STEP_BYTES = 4


def stepped(make: Any, steps: int = 2, **options: Any) -> tuple[torch.nn.Module, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 4))
    optimizer = make(model.named_parameters(), lr=1e-3, **options)
    for step in range(steps):
        for number, param in enumerate(model.parameters()):
            # the last one has gradients in the first step only
            param.grad = torch.ones_like(param) if step == 0 or number < 3 else None
        optimizer.step()
    return model, optimizer


def assert_tells_about(report: dict[str, Any], optimizer: Any, dim_orders: int = 0) -> None:
    """Bytes, shapes and steps are those of the optimizer."""
    params = optimizer.param_groups[0]["params"]
    assert report["parameters"] == sum(param.numel() for param in params)
    assert report["state_bytes"] + STEP_BYTES * len(params) == state_bytes(optimizer) + dim_orders
    assert [tuple(row["shape"]) for row in report["states"]] == [tuple(p.shape) for p in params]
    assert sum(row["bytes"] for row in report["keys"]) == report["state_bytes"]
    assert report["bits_per_parameter"] == 8 * report["state_bytes"] / report["parameters"]


def test_torch_file_of_ours(tmp_path: Path) -> None:
    _, optimizer = stepped(AdamW8bit, master_weight_bits=None, block_size=256)
    torch.save({"epoch": 1, "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    report = json_of("inspect", tmp_path / "last.pt")
    assert_tells_about(report, optimizer)
    assert (report["kind"], report["library"]) == ("torch file", "optstate")
    assert report["steps"] == [1, 2]
    assert [row["step"] for row in report["states"]] == [2, 2, 2, 1]
    assert report["groups"][0]["block_size"] == 256
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [row["parameter"] for row in report["states"]] == names
    formats = {
        key: format_.spec
        for key, format_ in optimizer.group_formats(optimizer.param_groups[0]).items()
    }
    for row in report["keys"]:
        moment = "exp_avg_sq" if row["key"].startswith("exp_avg_sq") else "exp_avg"
        assert row["format"] == ("" if row["key"] == "dim_order" else formats[moment])
    code, output = run("inspect", tmp_path / "last.pt", "--tensors")
    assert code == 0
    for part in ("steps 1 to 2", "exp_avg_sq_codes", "64 x 96", "0.bias", "block_size 256"):
        assert part in output


def test_safetensors_names_the_class(tmp_path: Path) -> None:
    _, optimizer = stepped(AdamW4bit)
    save_safetensors(optimizer, tmp_path / "a.safetensors")
    report = json_of("inspect", tmp_path / "a.safetensors")
    assert_tells_about(report, optimizer)
    assert (report["kind"], report["optimizer"]) == ("safetensors", "AdamW4bit")


def test_disk_store_by_either_of_its_files(tmp_path: Path) -> None:
    make = lambda params, lr: offload(AdamW8bit(params, lr), "disk", path=tmp_path / "s")  # noqa: E731
    _, optimizer = stepped(make)
    synchronize(optimizer)
    report = json_of("inspect", tmp_path / "s")
    assert {**json_of("inspect", tmp_path / "s.json"), "file": report["file"]} == report
    assert (report["kind"], report["steps"]) == ("disk store", [1, 2])
    # aligned to 128 bytes for each component
    assert 0 <= report["state_bytes"] - state_bytes(optimizer) < 4 * 4 * 128
    assert [row["shape"] for row in report["states"]] == [[64, 96], [64], [4, 64], [4]]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_by_its_metadata(tmp_path: Path) -> None:
    model, optimizer = stepped(AdamW8bit)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    report = json_of("inspect", tmp_path / "dcp")
    assert_tells_about(report, optimizer)
    assert (report["kind"], report["library"]) == ("distributed checkpoint", "optstate")
    assert json_of("inspect", tmp_path / "dcp", "--key", "optim")["states"] == report["states"]
    code, output = run("inspect", tmp_path / "dcp", "--key", "nothing")
    assert code == 2
    assert "no optimizer state under 'nothing'; has ['optim']" in output


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    class Other:
        def __reduce__(self) -> Any:
            return eval, ("1",)

    for attack in (Attack(), Other()):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(attack))
        code, output = run("inspect", tmp_path)
        assert code == 2
        assert "is refused" in output
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["bitsandbytes", "torchastic", "turboadam"])
def test_other_libraries_are_recognised(name: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.pt"
    path.write_bytes(lzma.decompress((PEERS / f"{name}.pt.xz").read_bytes()))
    report = json_of("inspect", path)
    assert report["library"].partition("-")[0] == name
    assert report["steps"] == [3, 3]
    exact = json_of("inspect", path, "--key", "exact")
    assert (exact["library"], exact["parameters"]) == ("torch", 64 * 72 + 5)
    assert exact["bits_per_parameter"] == 64
    assert report["state_bytes"] < exact["state_bytes"]


def test_files_without_state(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    (tmp_path / "text.json").write_text("{}")
    for name, complaint in {
        "weights.pt": "is no optimizer's state dict",
        "text.json": "not a manifest",
        ".": "no distributed checkpoint, whose folder has .metadata",
        "nothing.pt": "does not exist",
    }.items():
        code, output = run("inspect", tmp_path / name)
        assert code == 2
        assert complaint in output
