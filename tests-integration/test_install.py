"""The line that installs all packages from a clone, in a new environment and without an index."""

import json
import os
import shlex
import shutil
import site
import subprocess
import venv
from pathlib import Path

import pytest

from optstate.siblings import install_command

README = "packages/optstate/README.md"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of a new environment that sees this one's packages, such as torch."""
    folder = tmp_path / "env"
    venv.create(folder, with_pip=True)
    bin_ = folder / ("Scripts" if os.name == "nt" else "bin")
    (packages,) = folder.glob("lib/python*/site-packages")
    # older Pythons bring a setuptools that is too old for torch, and would hide the one outside
    for old in packages.glob("setuptools*"):
        shutil.rmtree(old)
    # appended to the path, so that what the environment has itself comes first
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))
    return bin_ / "python"


def test_the_line_of_the_readme_installs_all(python: Path, root: Path) -> None:
    (line,) = (
        line
        for line in (root / README).read_text().splitlines()
        if line.startswith("pip install ./packages/")
    )
    assert install_command("all").endswith(line)
    offline = ["--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    words = shlex.split(line)[2:]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = {"cwd": root, "env": environment, "check": True, "capture_output": True, "text": True}
    subprocess.run([python, "-m", "pip", "install", *offline, *words], **options)
    program = "import turboadam; print(turboadam.__file__, turboadam.__version__)"
    found = subprocess.run([python, "-c", program], **{**options, "cwd": python.parent}).stdout
    assert str(python.parent.parent) in found
    assert found.split()[-1].startswith("1.")
    command = [python.parent / "optstate", "estimate", "1M", "--json"]
    report = json.loads(subprocess.run(command, **options).stdout)
    assert {row["optimizer"] for row in report["rows"]} >= {"TurboAdam", "stochbf16.AdamW"}
    assert report["notes"][1:] == []
