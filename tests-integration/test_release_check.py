"""What the release check finds wrong, on files made here."""

import tarfile
import zipfile
from io import BytesIO
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

SCRIPT = run_path(str(Path(__file__).parent / "release_check.py"))
NAME, MODULE = "low-bit", "low_bit"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with one distribution that can be released."""
    folder = tmp_path / "packages" / NAME
    (folder / "src" / MODULE).mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    (folder / "src" / MODULE / "__init__.py").write_text('__version__ = "1.2.0"\n')
    entry = (
        "Tags are `low-bit-vX.Y.Z`.\n\n## 1.2.0 (2026-12-01)\n\n- New.\n\n## 1.1.0 (2026-11-01)\n"
    )
    (folder / "CHANGELOG.md").write_text(entry)
    (tmp_path / "LICENSE").write_text("the licence")
    build(tmp_path, {})
    return tmp_path


def build(root: Path, changed: dict[str, str | None]) -> None:
    """A wheel and an sdist, with some of their files changed or left out."""
    (root / "dist").mkdir(exist_ok=True)
    meta = "Name: low-bit\nVersion: 1.2.0\nLicense-Expression: MIT\n"
    info = f"{MODULE}-1.2.0.dist-info"
    wheel = {f"{MODULE}/py.typed": "", f"{info}/METADATA": meta}
    wheel[f"{info}/licenses/LICENSE"] = "the licence"
    sdist = {f"src/{MODULE}/py.typed": "", "PKG-INFO": meta, "LICENSE": "the licence"}
    sdist |= {"CHANGELOG.md": "", "README.md": ""}
    with zipfile.ZipFile(root / "dist" / f"{MODULE}-1.2.0-py3-none-any.whl", "w") as archive:
        for name, text in (wheel | changed).items():
            if text is not None and name in wheel:
                archive.writestr(name, text)
    with tarfile.open(root / "dist" / f"{MODULE}-1.2.0.tar.gz", "w:gz") as archive:
        for name, text in (sdist | changed).items():
            if text is not None and name in sdist:
                member = tarfile.TarInfo(f"{MODULE}-1.2.0/{name}")
                member.size = len(text.encode())
                archive.addfile(member, BytesIO(text.encode()))


def problems(root: Path, tag: str | None = None, **tags: bool) -> list[str]:
    named = dict(tags)
    return [
        *SCRIPT["archive_problems"](NAME, root, root / "dist"),
        *SCRIPT["release_problems"](NAME, root, named, tag),
        *(SCRIPT["tag_problems"]([NAME], {NAME: "1.2.0"}, tag) if tag else ()),
    ]


def test_nothing_is_wrong_with_this_one(tree: Path) -> None:
    assert problems(tree) == problems(tree, "low-bit-v1.2.0") == []
    assert SCRIPT["distributions"](tree) == [NAME]
    assert SCRIPT["version_of"](NAME, tree) == "1.2.0"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (f"{MODULE}/py.typed", None, "the wheel has no low_bit/py.typed"),
        (f"src/{MODULE}/py.typed", None, "the sdist has no low_bit/py.typed"),
        (f"{MODULE}-1.2.0.dist-info/licenses/LICENSE", "other", "the wheel does not have the"),
        ("LICENSE", None, "the sdist does not have the repository's LICENSE"),
        ("CHANGELOG.md", None, "the sdist has no CHANGELOG.md"),
        ("PKG-INFO", "Version: 1.1.0\nLicense-Expression: MIT\n", "sdist has version 1.1.0"),
        ("PKG-INFO", "Version: 1.2.0\n", "the sdist declares licence None, not MIT"),
    ],
)
def test_what_an_archive_lacks(tree: Path, file: str, text: str | None, words: str) -> None:
    build(tree, {file: text})
    (found,) = problems(tree)
    assert found.startswith("low-bit: ")
    assert words in found


def test_archives_of_one_version(tree: Path) -> None:
    (tree / "dist" / f"{MODULE}-1.1.0.tar.gz").touch()
    assert "2 files low_bit-*.tar.gz in dist/, must be 1" in problems(tree)[0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("1.2.0 (2026-12-01)", "1.2.1 (2026-12-01)", "has no entry '## 1.2.0'"),
        ("## 1.2.0", "## 1.3.0 (unreleased)\n\n## 1.2.0", "begins with 1.3.0, the version is"),
        ("`low-bit-vX.Y.Z`", "`vX.Y.Z`", "does not say that tags are `low-bit-vX.Y.Z`"),
    ],
)
def test_changelogs(tree: Path, old: str, new: str, words: str) -> None:
    path = tree / "packages" / NAME / "CHANGELOG.md"
    path.write_text(path.read_text().replace(old, new))
    assert words in problems(tree)[0]


def test_a_release_has_a_date_and_nothing_else_needs_one(tree: Path) -> None:
    path = tree / "packages" / NAME / "CHANGELOG.md"
    path.write_text(path.read_text().replace("2026-12-01", "unreleased"))
    assert problems(tree) == []
    (found,) = problems(tree, "low-bit-v1.2.0")
    assert "must date 1.2.0 (YYYY-MM-DD), has 'unreleased'" in found


def test_a_tagged_version_stays_as_it_was(tree: Path) -> None:
    assert problems(tree, **{"low-bit-v1.2.0": True, "low-bit-v1.1.0": False}) == []
    (found,) = problems(tree, **{"low-bit-v1.2.0": False})
    assert "sources have changed since: raise the version" in found
    (found,) = problems(tree, **{"low-bit-v2.0.0": True, "other-v3.0.0": True})
    assert "version 1.2.0 is below the tagged 2.0.0" in found


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("v1.2.0", "must be <dist>-vX.Y.Z with one of low-bit"),
        ("other-v1.2.0", "must be <dist>-vX.Y.Z"),
        ("low-bit-v1.2", "the version of low-bit is 1.2.0"),
        ("low-bit-vnext", "must be <dist>-vX.Y.Z"),
        ("low-bit-v1.3.0", "the version of low-bit is 1.2.0"),
    ],
)
def test_tags_that_release_nothing(tree: Path, tag: str, words: str) -> None:
    found: list[Any] = problems(tree, tag)
    assert words in found[-1]
