"""The suite finds every public optimizer by itself, and fails for one that breaks a law."""

import importlib.metadata
from pathlib import Path

import pytest

from suite import discovery
from suite.cases import FIRST, Case, every_case, excluded
from suite.configurations import configurations
from suite.discovery import GROUP, ROOT, modules, public_optimizers
from suite.exclusions import EXCLUSIONS
from suite.test_laws import ALL, CASES

WRONG = '''
import torch
from lowbit_adam import AdamW8bit
from optstate_codecs.formats import Int8

__all__ = ["Correct", "Forgetful", "Hoarder", "Vanishing", "helper"]


class Correct(AdamW8bit):
    """As its base, but for a method of its own."""

    def nothing(self):
        pass


class Forgetful(AdamW8bit):
    """Counts one step more than there was, after loading."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] += 1


class Hoarder(AdamW8bit):
    """Keeps a buffer that it does not declare."""

    def step(self, closure=None):
        super().step(closure)
        for param, state in self.state.items():
            state["hidden"] = torch.zeros_like(param)


class Rounding(Int8):
    """Claims to keep small numbers, and rounds them to zero."""

    keeps_positive = True


class Vanishing(AdamW8bit):
    """Its second moment may be zero."""

    @classmethod
    def moment_formats(cls, block_size):
        return super().moment_formats(block_size)[0], Rounding(block_size)


def helper(params):
    """Not an optimizer."""
'''
ODD = """
import torch

__all__ = ["Odd"]


class Odd(torch.optim.SGD):
    def __init__(self, model):
        super().__init__(model.parameters())
"""
METADATA = "Metadata-Version: 2.1\nName: wrong-optimizers\nVersion: 1.0\n"
#: each has its own laws broken, and at least these
BROKEN = {
    "Correct": set(),
    "Forgetful": {"resume"},
    "Hoarder": {"bytes_are_said"},
    "Vanishing": {"positive_stays_positive"},
}


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution with wrong optimizers, installed beside the others."""
    (tmp_path / "wrong_optimizers.py").write_text(WRONG)
    info = tmp_path / "wrong_optimizers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    entries = "".join(f"{name} = wrong_optimizers:{name}\n" for name in BROKEN)
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}")
    monkeypatch.syspath_prepend(tmp_path)
    return "wrong_optimizers"


def raises(case: Case, folder: Path) -> bool:
    try:
        with case.subject(folder) as subject:
            case.law(subject)
    except AssertionError:
        return True
    return False


def test_a_new_distribution_is_found_and_its_wrong_optimizers_fail(
    wrong: str, tmp_path: Path
) -> None:
    assert wrong in modules()
    publics = [public for public in public_optimizers() if public.name.startswith(wrong)]
    assert [public.name for public in publics] == [f"{wrong}.{name}" for name in sorted(BROKEN)]
    cases = [
        case
        for case in every_case([c for c in configurations(publics) if not c.variant])
        if case.point == FIRST
        and excluded(case) is None
        # in a second each, and enough to tell
        and case.law.__name__ not in ("unbiased_length", "zero_stays", "independence")
    ]
    failed: dict[str, set[str]] = {name: set() for name in BROKEN}
    for case in cases:
        if raises(case, tmp_path):
            name = case.configuration.name.removeprefix(f"{wrong}.")
            failed[name].add(case.law.__name__)
    for name, laws in BROKEN.items():
        assert laws <= failed[name], name
        assert bool(laws) == bool(failed[name]), name


def test_the_same_is_found_with_and_without_installed_metadata(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everywhere = public_optimizers()
    monkeypatch.setattr(discovery, "entry_points", lambda group: ())
    assert public_optimizers() == everywhere
    # and from metadata alone
    declared = [p for p in everywhere if p.takes == "params" and p.name.count("Coded") == 0]
    entries = [
        importlib.metadata.EntryPoint(name, public.name.replace(".", ":"), GROUP)
        for name, public in enumerate(declared)
    ]
    monkeypatch.setattr(discovery, "ROOT", tmp_path)
    monkeypatch.setattr(discovery, "entry_points", lambda group: entries)
    assert {p.name for p in declared} <= {p.name for p in public_optimizers()}


def test_every_declared_optimizer_is_checked() -> None:
    """What pyproject.toml and the installed metadata name is among the cases, under its name."""
    checked = {case.configuration.public.name for case in CASES}
    assert checked == {public.name for public in public_optimizers()}
    tree = {path.name for path in ROOT.glob("packages/*/src/*")}
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.module in tree:
            assert f"{entry.module}.{entry.attr}" in checked


def test_a_name_that_takes_neither_parameters_nor_an_optimizer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "odd_optimizers.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match=r"odd_optimizers\.Odd: its first argument is 'model'"):
        public_optimizers(["odd_optimizers"])


def test_every_exclusion_is_needed() -> None:
    used = {excluded(case) for case in ALL}
    assert [entry.condition for entry in EXCLUSIONS if entry not in used] == []


def test_counts() -> None:
    on_cpu = sum(case.point.device == "cpu" for case in CASES)
    assert len(CASES) > 1500
    assert on_cpu > 0.9 * len(CASES)
    assert len({case.name for case in CASES}) == len(CASES)
    laws = {case.law.__name__ for case in CASES if case.point.device == "cpu"}
    assert len(laws) == 11
