"""The fuzz targets keep their contract for their seeds, and notice readers that break it.

Fuzzing itself takes minutes and another package: ``nox -s fuzz``.
"""

import importlib
import random
import sys
from pathlib import Path

import pytest

from optstate_codecs import CodedOptimizer
from optstate_codecs.offloading import manifest as manifest_module

FUZZ = Path(__file__).parent / "fuzz"
NAMES = ("manifest", "header", "state_dict")
# inputs that fuzzing has found, for which a reader broke its contract
FOUND = {
    "manifest": [b"\x01\x00\xf7\x01w"],
    "header": [],
    "state_dict": [
        *(b"\x05\x00\x05\xf7\x00\x056", b"(\x00\t\t", b"\x06\x00&\x06\x06\x00\x06K"),
        *(b"\x0c\x00)))\x05\x0c", b"\x06\x00N\x0299", b"\x00\x00g\x01\x11\x0c"),
        *(b"\x02\x00!\x06\xff!\xf7!\xff", b"((\x00\t\xff\t"),
        b"\x06\x00\x05\x03DE",
        b"\x06\x00\xc5\x02\xff\xffEbetasE",
        b"\x81\x00\x18\x01J\x18",
        b"\x05\x00E\x06:\x00G'E'",
        b"\x03\x01\x00\x1e" + 5 * b"\x99" + b"betas" + 14 * b"\x99",
        b"\x03\x01\x00\x1e" + 26 * b"\x99",
        8 * b"\x13" + b"\x04\x00'\x06\x00" + 3 * b"'",
    ],
}


@pytest.fixture
def load(monkeypatch):
    """A function that makes a target by its name."""
    monkeypatch.syspath_prepend(FUZZ)
    yield lambda name: importlib.import_module(name).Target()
    for name in (*NAMES, "edits", "contract"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, load) -> None:
    target = load(name)
    chosen = random.Random(0).sample(target.seeds(), 40)
    for data in [*FOUND[name], *chosen]:
        target.one(data)
    assert target.refused > 10
    assert target.loaded > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_change_before_an_error_is_a_violation(load, monkeypatch) -> None:
    target = load("state_dict")
    violation = importlib.import_module("contract").Violation
    real = CodedOptimizer.load_state_dict

    def careless(self, state_dict):
        self.param_groups[0]["lr"] = 7.0
        real(self, state_dict)

    monkeypatch.setattr(CodedOptimizer, "load_state_dict", careless)
    refused = target.seeds()[0]
    assert target.refused == 0
    with pytest.raises(violation, match="changed before"):
        target.one(refused)


def test_an_undocumented_error_is_a_violation(load, monkeypatch) -> None:
    target = load("manifest")
    violation = importlib.import_module("contract").Violation
    monkeypatch.setattr(manifest_module, "_faults", lambda manifest: 1 / 0)
    with pytest.raises(violation, match="ZeroDivisionError"):
        target.one(target.seeds()[0])
