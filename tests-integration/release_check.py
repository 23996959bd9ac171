"""Checks that what `build` left in dist/ can be released; `nox -s release_check` runs it last.

    python tests-integration/release_check.py                         all distributions
    python tests-integration/release_check.py --tag turboadam-v1.0.0  what this tag releases

Wheel and sdist of a distribution have one version, which the sources, the changelog and the tag
name too. Both bring the licence, the wheel its marker of types. A version that a tag has released
cannot be released again from other sources. Prints every problem, and fails if there is one.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
DAY = re.compile(r"\d{4}-\d\d-\d\d")


def distributions(root: Path) -> list[str]:
    """The names of what the repository releases."""
    return sorted(path.parent.name for path in root.glob("packages/*/pyproject.toml"))


def parsed(tag: str, names: list[str]) -> tuple[str, Version] | None:
    """Distribution and version of a tag, or None if it has no such name."""
    name, mark, text = tag.rpartition("-v")
    try:
        version = Version(text)
    except InvalidVersion:
        return None
    return (name, version) if mark and name in names and str(version) == text else None


def contents(path: Path) -> dict[str, str]:
    """The text of the small files of a wheel or sdist that are checked."""
    wanted = ("METADATA", "PKG-INFO", "LICENSE", "py.typed", "CHANGELOG.md", "README.md")
    found = {}
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                if name.endswith(wanted):
                    found[name] = wheel.read(name).decode()
        return found
    with tarfile.open(path) as sdist:
        for member in sdist.getmembers():
            file = sdist.extractfile(member) if member.name.endswith(wanted) else None
            if file is not None:
                # the first folder is the name of the sdist
                found[member.name.partition("/")[2]] = file.read().decode()
    return found


def version_of(name: str, root: Path) -> str:
    """The version that the sources state."""
    module = name.replace("-", "_")
    source = (root / "packages" / name / "src" / module / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "([^"]+)"', source, re.MULTILINE)
    return version


def archive_problems(name: str, root: Path, dist: Path) -> Iterator[str]:
    """What is wrong with the wheel and the sdist of a distribution."""
    module, version = name.replace("-", "_"), version_of(name, root)
    licence = (root / "LICENSE").read_text()
    for ending, kind, meta in (("-*.whl", "wheel", "METADATA"), ("-*.tar.gz", "sdist", "PKG-INFO")):
        paths = list(dist.glob(f"{module}{ending}"))
        if len(paths) != 1:
            yield f"{name}: {len(paths)} files {module}{ending} in {dist.name}/, must be 1"
            continue
        files = contents(paths[0])
        fields = Parser().parsestr(next((t for n, t in files.items() if n.endswith(meta)), ""))
        if fields["Version"] != version:
            yield f"{name}: the {kind} has version {fields['Version']}, the sources {version}"
        if fields["License-Expression"] != "MIT":
            yield f"{name}: the {kind} declares licence {fields['License-Expression']}, not MIT"
        if licence not in [text for path, text in files.items() if path.endswith("LICENSE")]:
            yield f"{name}: the {kind} does not have the repository's LICENSE"
        if f"{module}/py.typed" not in [path.removeprefix("src/") for path in files]:
            yield f"{name}: the {kind} has no {module}/py.typed"
        for file in ("CHANGELOG.md", "README.md") if kind == "sdist" else ():
            if file not in files:
                yield f"{name}: the sdist has no {file}"


def release_problems(
    name: str, root: Path, tags: dict[str, bool], tag: str | None
) -> Iterator[str]:
    """What is wrong with changelog and tags.

    Args:
        name: of the distribution.
        root: the repository.
        tags: each tag, and whether the sources are still those that it has.
        tag: the tag that is released now, or None.
    """
    version = version_of(name, root)
    changes = (root / "packages" / name / "CHANGELOG.md").read_text()
    entries = dict(re.findall(r"^## (\S+)(?: \(([^)]*)\))?$", changes, re.MULTILINE))
    own = f"{name}-v{version}"
    if version not in entries:
        yield f"{name}: CHANGELOG.md has no entry '## {version}'"
    elif next(iter(entries)) != version:
        yield f"{name}: CHANGELOG.md begins with {next(iter(entries))}, the version is {version}"
    elif (own in tags or own == tag) and not DAY.fullmatch(entries[version]):
        yield f"{name}: CHANGELOG.md must date {version} (YYYY-MM-DD), has '{entries[version]}'"
    if f"`{name}-vX.Y.Z`" not in changes:
        yield f"{name}: CHANGELOG.md does not say that tags are `{name}-vX.Y.Z`"
    if tags.get(own) is False:
        yield f"{name}: {own} is tagged, and the sources have changed since: raise the version"
    later = [found[1] for other in tags if (found := parsed(other, [name]))]
    if later and max(later) > Version(version):
        yield f"{name}: version {version} is below the tagged {max(later)}"


def tag_problems(names: list[str], versions: dict[str, str], tag: str) -> Iterator[str]:
    """What is wrong with the tag that is to be released."""
    found = parsed(tag, names)
    if found is None:
        yield f"{tag}: must be <dist>-vX.Y.Z with one of {', '.join(names)}"
    elif versions[found[0]] != str(found[1]):
        yield f"{tag}: the version of {found[0]} is {versions[found[0]]}"


def git(*words: str) -> str:
    """The output of git in the repository."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
    ).stdout


def tagged(names: list[str]) -> dict[str, bool]:
    """The tags of this repository, and whether the package is as it was at each."""
    found = {}
    for tag in git("tag", "--list", "*-v*").split():
        if known := parsed(tag, names):
            changed = git("diff", "--name-only", tag, "--", f"packages/{known[0]}/src")
            found[tag] = not changed.strip()
    return found


def main() -> None:
    """Checks dist/."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--tag", help="a tag that is released now")
    parser.add_argument("--collect", type=Path, help="folder for the files that --tag releases")
    args = parser.parse_args()
    if args.collect and not args.tag:
        parser.error("--collect: needs --tag")
    names = distributions(ROOT)
    versions = {name: version_of(name, ROOT) for name in names}
    tags = tagged(names)
    problems = [problem for name in names for problem in archive_problems(name, ROOT, args.dist)]
    problems += [p for name in names for p in release_problems(name, ROOT, tags, args.tag)]
    problems += tag_problems(names, versions, args.tag) if args.tag else []
    if problems:
        sys.exit("\n".join(problems))
    for name, version in versions.items():
        sys.stdout.write(f"{name} {version} can be released\n")
    if args.collect:
        args.collect.mkdir(parents=True, exist_ok=True)
        module = args.tag.rpartition("-v")[0].replace("-", "_")
        for path in args.dist.glob(f"{module}-*"):
            shutil.copy(path, args.collect)


if __name__ == "__main__":
    main()
