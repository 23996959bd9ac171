"""Files that earlier code wrote: they load, decode to the same numbers, and training goes on."""

import copy
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

from optstate_codecs import offload

FOLDER = Path(__file__).parent / "old_files"
OLD = SimpleNamespace(**runpy.run_path(str(FOLDER / "make_old_files.py")))
FILES = {kind: OLD.read(FOLDER / f"{kind}.pt.xz") for kind in ("family", "flat", "wrapped", "disk")}


def assert_same(new, old, where: str = "", exact: bool = True) -> None:
    """Nested containers have the same keys, types, dtypes and bits.

    Not ``exact``: up to an ulp of torch's own square root, which depends on the processor.
    """
    if isinstance(old, torch.Tensor):
        assert new.dtype == old.dtype, where
        if exact or not old.is_floating_point():
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True, msg=where)
        else:
            rtol = 2**-7 if old.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(new, old, rtol=rtol, atol=1e-7)
    elif isinstance(old, dict):
        assert list(new) == list(old), where
        for key in old:
            assert_same(new[key], old[key], f"{where}[{key!r}]", exact)
    elif isinstance(old, (list, tuple)):
        assert type(new) is type(old), where
        assert len(new) == len(old), where
        for index, (one, other) in enumerate(zip(new, old, strict=True)):
            assert_same(one, other, f"{where}[{index}]", exact)
    else:
        assert (type(new), new) == (type(old), old), where


def assert_goes_on(model, optimizer, old, exact: bool, decoded=OLD.decoded) -> None:
    """What was loaded decodes as it did, and two more steps give the parameters that they gave."""
    assert_same(decoded(optimizer, model), old["decoded"])
    model.train(optimizer, range(OLD.SAVED, OLD.LAST))
    assert_same(model.values(), old["after"], "after", exact)


def start(build, old, *args, **options):
    """A model with the parameters of the file and a new optimizer."""
    model, optimizer = OLD.make(build, *args, **options)
    model.set(old["params"])
    return model, optimizer


def is_exact(name: str) -> bool:
    """Whether no moment is in float32, where steps have the root of torch.optim."""
    return not name.startswith("TurboAdam")


def test_the_files_are_complete_and_small() -> None:
    assert set(FILES["family"]) == set(OLD.FAMILY)
    assert set(FILES["flat"]) == set(OLD.FLAT)
    assert set(FILES["disk"]) == set(OLD.DISK)
    assert {name.rpartition(", ")[0] for name in FILES["wrapped"]} == set(OLD.WRAPPED)
    assert sum(path.stat().st_size for path in FOLDER.glob("*.xz")) < 300 * 2**10


@pytest.mark.parametrize("name", OLD.FAMILY)
def test_packed_state_dicts_load(name: str) -> None:
    old = FILES["family"][name]
    model, optimizer = start(OLD.FAMILY[name], old, OLD.rows(name), backend="eager")
    optimizer.load_state_dict(copy.deepcopy(old["optimizer"]))
    assert_same(optimizer.state_dict(), old["optimizer"])
    assert_goes_on(model, optimizer, old, is_exact(name))


@pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch", "ignore:.*:UserWarning:torch")
@pytest.mark.parametrize("name", OLD.FLAT)
def test_flat_state_dicts_load(name: str) -> None:
    old = FILES["flat"][name]
    model, optimizer = start(OLD.FLAT[name], old, backend="eager")
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(old["optimizer"]), options=OLD.OPTIONS)
    assert_goes_on(model, optimizer, old, is_exact(name))


@pytest.mark.parametrize("name", FILES["wrapped"])
def test_state_dicts_of_wrapped_optimizers_load(name: str) -> None:
    old, kind = FILES["wrapped"][name], name.rpartition(", ")
    model, optimizer = start(OLD.WRAPPED[kind[0]], old)
    optimizer.load_state_dict(copy.deepcopy(old["optimizer"]))
    if kind[2] == "packed":
        assert_same(optimizer.packed_state_dict(), old["optimizer"])
    assert_goes_on(model, optimizer, old, False, OLD.state)


@pytest.mark.parametrize("name", OLD.DISK)
def test_files_of_state_are_resumed(name: str, tmp_path: Path) -> None:
    old = FILES["disk"][name]
    for file, content in old["optimizer"].items():
        (tmp_path / file).write_bytes(content)
    model, optimizer = start(OLD.DISK[name], old, backend="eager")
    offload(optimizer, "disk", path=tmp_path / "state.bin", resume=True)
    assert_goes_on(model, optimizer, old, True)


@pytest.mark.parametrize("name", OLD.DISK)
def test_manifests_say_what_they_said(name: str, tmp_path: Path) -> None:
    model, optimizer = OLD.make(OLD.DISK[name], backend="eager")
    offload(optimizer, "disk", path=tmp_path / "state.bin")
    model.train(optimizer, range(OLD.SAVED))
    OLD.synchronize(optimizer)
    new = json.loads((tmp_path / "state.bin.json").read_text())
    old = json.loads(FILES["disk"][name]["optimizer"]["state.bin.json"])
    assert new.pop("id") != old.pop("id")  # drawn for each file
    assert new == old
