"""The docs: their examples run, and they leave out no public name, option or variable."""

import re
import zlib
from importlib import import_module
from pathlib import Path
from runpy import run_path

import pytest
import typer

ROOT = Path(__file__).parents[1]
run = run_path(str(ROOT / "tests-integration" / "run_examples.py"))["run"]
PAGES = sorted(
    path
    for pattern in ("docs/**/*.md", "*.md", "packages/*/README.md")
    for path in ROOT.glob(pattern)
    if "```python" in path.read_text()
)
PUBLIC = (
    "lowbit_adam",
    "turboadam",
    "stochbf16",
    "optstate_wrap",
    "optstate_codecs",
    "optstate_codecs.convert",
    "optstate_codecs.formats",
    "optstate_codecs.rules",
    "optstate_codecs.memory",
    "optstate_codecs.rounding",
    "optstate_codecs.testing",
)


def test_there_are_examples() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert names >= {"README.md", "docs/tutorials/stochbf16.md", "docs/how-to/checkpoints.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page are one program, which runs from top to bottom."""
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.fixture(scope="session")
def inventory(site: Path) -> set[str]:
    """Every name that the built site documents."""
    header, _, body = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    assert header.startswith(b"# Sphinx inventory version 2")
    return {line.split(" ", 1)[0] for line in zlib.decompress(body).decode().splitlines()}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str, inventory: set[str]) -> None:
    names = {f"{module}.{name}" for name in import_module(module).__all__}
    assert names
    assert names <= inventory


def test_every_option_of_the_command_is_in_the_reference() -> None:
    from optstate.cli import app

    page = (ROOT / "docs" / "reference" / "optstate.md").read_text()
    for name, command in typer.main.get_group(app).commands.items():
        assert f"## optstate {name}" in page
        for parameter in command.params:
            for option in parameter.opts:
                shown = option if option.startswith("-") else option.upper()
                assert f"`{shown}`" in page.partition(f"## optstate {name}")[2].split("\n## ")[0]


def test_every_short_name_of_an_optimizer_is_in_the_reference() -> None:
    from optstate.names import SHORT_NAMES

    page = (ROOT / "docs" / "reference" / "optstate.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `--optimizer` |"))
    assert SHORT_NAMES
    for full in SHORT_NAMES.values():
        assert f"`{full.rpartition('.')[2]}`" in row


def test_every_name_of_another_library_in_the_how_to_is_in_the_error() -> None:
    from optstate_codecs.arguments import ELSEWHERE

    page = (ROOT / "docs" / "how-to" / "arguments.md").read_text()
    table = page.partition("| elsewhere |")[2].partition("\n\n")[0]
    names = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert len(names) == 6
    assert set(names) <= set(ELSEWHERE)


def test_defaults_in_the_reference_are_those_of_the_command() -> None:
    from optstate.demo.settings import Settings

    page = (ROOT / "docs" / "reference" / "optstate.md").read_text()
    assert f"| `--steps` | {Settings.steps} |" in page
    assert f"| `--lr` | {Settings.lr} |" in page
    read = Settings.validation_batches * Settings.batch * Settings.context
    assert f"same {read:,} bytes" in page


def test_every_environment_variable_is_in_the_table() -> None:
    table = (ROOT / "docs" / "how-to" / "environment.md").read_text()
    sources = [ROOT / "noxfile.py", *ROOT.glob("packages/*/src/**/*.py")]
    pattern = re.compile(r"\"((?:[A-Z0-9]+_)+[A-Z0-9]+|PYTHONPATH|MYPYPATH)\"")
    used = {
        name
        for path in sources
        if "environ" in path.read_text()
        for name in pattern.findall(path.read_text())
        # a name that the file itself defines is a constant in its __all__
        if not re.search(rf"^{name}\b", path.read_text(), re.MULTILINE)
    }
    assert "PIP_FIND_LINKS" in used
    assert {name for name in used if f"| `{name}` |" not in table} == set()


def test_errors_in_the_faq_are_those_of_the_code() -> None:
    """Each message of ours is in a source, values aside, so that a search for it ends there."""
    page = (ROOT / "docs" / "faq.md").read_text().partition("## Errors by message")[2]
    sources = "".join(path.read_text() for path in ROOT.glob("packages/*/src/**/*.py"))
    # adjacent literals are one text
    sources = re.sub(r"\"\s*f?\"", "", sources)
    sources = re.sub(r"{[^{}]*}", "...", sources)
    messages = re.findall(r"^`([^`]+)`$", page, re.MULTILINE)
    ours = [message for message in messages if not message.startswith("No module named")]
    assert len(ours) > 35
    fragments = {part.strip(" :;,=") for message in ours for part in re.split(r"\.\.\.", message)}
    assert {part for part in fragments if len(part) > 12 and part not in sources} == set()
