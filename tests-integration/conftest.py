"""Where the repository, its packages and its site are; the counts of torch's optimizer cases."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
# of modules that the tests share
sys.path.insert(0, str(Path(__file__).parent))
# before anything imports transformers: nothing here needs a file from the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# `pytest --hypothesis-profile=thorough` runs a thousand random sequences
settings.register_profile("thorough", max_examples=1000)


@dataclass(frozen=True)
class Package:
    """One distribution in the tree."""

    name: str

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def folder(self) -> Path:
        return ROOT / "packages" / self.name

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.module

    @property
    def project(self) -> dict:
        return tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]


PACKAGES = [Package(path.parent.name) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]


@pytest.fixture(params=PACKAGES, ids=lambda package: package.name)
def package(request: pytest.FixtureRequest) -> Package:
    return request.param


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def packages() -> list[Package]:
    return PACKAGES


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""

    def build(folder: Path) -> None:
        # not --quiet, under which --strict counts no warnings
        subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
            cwd=ROOT,
            env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
            check=True,
        )

    from once import made_once

    return made_once(tmp_path_factory, "site", build)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add up what the tests in torch_cases/ have counted, in all processes."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    counts = Counter[str]()
    for report in reports:
        if getattr(report, "when", None) == "call":
            counts.update(dict(report.user_properties).get("torch cases", {}))
    if counts:
        line = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        terminalreporter.write_line(f"torch's optimizer cases: {line}")
