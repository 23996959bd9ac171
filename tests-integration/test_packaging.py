"""What each distribution declares is what it needs, and what its wheel holds."""

import ast
import inspect
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from email.parser import Parser
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch.optim import Optimizer

IMPORT_OF = {"pillow": "PIL"}
"""Import names that differ from the distribution's by more than a dash."""


GROUP = "optstate.optimizers"
"""The entry points by which launchers find optimizers."""


def requirements(package) -> list[Requirement]:
    """Everything a package may install: its dependencies and those of its extras."""
    project = package.project
    extras = project.get("optional-dependencies", {}).values()
    return [
        Requirement(line)
        for line in [*project.get("dependencies", []), *(line for e in extras for line in e)]
    ]


def import_name(requirement: Requirement) -> str:
    return IMPORT_OF.get(requirement.name, requirement.name.replace("-", "_"))


def imports(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, `require("name")` included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
            yield from (
                arg.value.partition(".")[0] for arg in node.args if isinstance(arg, ast.Constant)
            )


def test_there_are_packages(packages) -> None:
    assert {p.name for p in packages} >= {"optstate-codecs", "lowbit-adam", "turboadam", "optstate"}


def test_every_import_is_declared(package) -> None:
    used = {name for path in package.source.rglob("*.py") for name in imports(path)}
    third_party = used - set(sys.stdlib_module_names) - {package.module}
    assert third_party <= {import_name(r) for r in requirements(package)}


def test_no_sibling_is_imported_but_the_codecs(package, packages) -> None:
    siblings = {p.module for p in packages} - {package.module, "optstate_codecs"}
    used = {name for path in package.source.rglob("*.py") for name in imports(path)}
    assert not used & siblings


def test_every_pin_of_a_sibling_accepts_the_tree(packages) -> None:
    versions = {p.name: import_module(p.module).__version__ for p in packages}
    pins = [(p, r) for p in packages for r in requirements(p) if r.name in versions]
    assert pins
    for package, pin in pins:
        if pin.name != package.name:
            assert pin.specifier, f"{package.name}: {pin} has no range"
            assert pin.specifier.contains(versions[pin.name]), f"{package.name}: {pin}"


def test_umbrella_names_the_extra_of_every_optional_module(packages) -> None:
    from optstate.siblings import EXTRA_OF

    (umbrella,) = (p for p in packages if p.name == "optstate")
    extras = umbrella.project["optional-dependencies"]
    for module, extra in EXTRA_OF.items():
        assert module in {import_name(Requirement(line)) for line in extras[extra]}


def test_umbrella_installs_every_sibling_that_an_extra_needs(packages) -> None:
    from optstate.siblings import SIBLINGS_OF, install_command

    by_name = {p.name: p for p in packages}
    extras = by_name["optstate"].project["optional-dependencies"]
    assert set(SIBLINGS_OF) == set(extras)
    for extra, siblings in SIBLINGS_OF.items():
        lines = [Requirement(line) for line in extras[extra]]
        parts = [part for line in lines if line.name == "optstate" for part in line.extras]
        lines += [Requirement(line) for part in parts for line in extras[part]]
        needed = {line.name for line in lines} & set(by_name) - {"optstate"}
        needed |= {r.name for n in needed for r in requirements(by_name[n])} & set(by_name)
        assert set(siblings) == needed
        assert all((by_name[name].folder / "pyproject.toml").exists() for name in siblings)
        assert all(f"./packages/{name} " in install_command(extra) for name in siblings)


def test_python_version_and_license_agree(package, root) -> None:
    assert package.project["requires-python"] == ">=3.10"
    assert (package.folder / "LICENSE").read_text() == (root / "LICENSE").read_text()


def test_changelog_has_the_version(package) -> None:
    version = import_module(package.module).__version__
    assert f"\n## {version}" in (package.folder / "CHANGELOG.md").read_text()


def optimizers(package) -> dict[str, str]:
    """Names and values of the entry points that a package declares."""
    return package.project.get("entry-points", {}).get(GROUP, {})


def test_every_optimizer_is_an_entry_point(package) -> None:
    public = vars(import_module(package.module))
    classes = {
        cls
        for cls in map(public.get, public.get("__all__", ()))
        if isinstance(cls, type)
        and issubclass(cls, Optimizer)
        and next(iter(inspect.signature(cls).parameters)) == "params"
        # which takes a rule too
        and cls.__name__ != "CodedOptimizer"
    }
    found = {n: EntryPoint(n, v, GROUP).load() for n, v in optimizers(package).items()}
    assert set(found.values()) == classes
    for name, cls in found.items():
        assert name in (cls.__name__, f"{package.module}.{cls.__name__}")


def test_no_two_optimizers_have_one_name(packages) -> None:
    names = [name for package in packages for name in optimizers(package)]
    assert len(set(names)) == len(names) > 20


def test_installed_entry_points_load() -> None:
    for entry in entry_points(group=GROUP):
        assert issubclass(entry.load(), Optimizer)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels built here, by distribution."""
    built: dict[str, Path] = {}

    def build(package) -> Path:
        if package.name not in built:
            folder = tmp_path_factory.mktemp(package.module)
            command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
            subprocess.run([*command, folder, package.folder], check=True, capture_output=True)
            (built[package.name],) = folder.iterdir()
        return built[package.name]

    return build


def test_wheel_holds_the_sources_and_nothing_else(package, wheels) -> None:
    with zipfile.ZipFile(wheels(package)) as wheel:
        files = {n for n in wheel.namelist() if ".dist-info/" not in n}
    sources = {
        path.relative_to(package.source.parent).as_posix()
        for path in package.source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == sources
    assert f"{package.module}/py.typed" in files


def test_wheel_declares_what_the_project_says(package, wheels) -> None:
    with zipfile.ZipFile(wheels(package)) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
        licenses = [n for n in wheel.namelist() if n.endswith("/licenses/LICENSE")]
    assert licenses
    assert metadata["Name"] == package.name
    assert metadata["Version"] == import_module(package.module).__version__
    declared = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    base = {r.name for r in declared if "extra" not in str(r.marker)}
    assert base == {Requirement(line).name for line in package.project["dependencies"]}
    assert metadata.get_payload().strip().startswith(f"# {package.name}")


def test_wheel_has_the_entry_points_of_its_optimizers(package, wheels) -> None:
    parser = ConfigParser(delimiters="=")
    parser.optionxform = str
    with zipfile.ZipFile(wheels(package)) as wheel:
        for name in wheel.namelist():
            if name.endswith(".dist-info/entry_points.txt"):
                parser.read_string(wheel.read(name).decode())
    found = dict(parser[GROUP]) if GROUP in parser else {}
    assert found == optimizers(package)


def test_the_repository_has_one_address(packages, root: Path) -> None:
    """One string to replace, see docs/maintainers.md."""
    declared = {package.project["urls"]["Repository"] for package in packages}
    (address,) = declared
    for package in packages:
        urls = package.project["urls"]
        assert urls["Changelog"] == f"{address}/blob/main/packages/{package.name}/CHANGELOG.md"
    assert f"repo_url: {address}\n" in (root / "mkdocs.yml").read_text()
    for page in ("README.md", "docs/index.md", "docs/getting-started.md"):
        assert f"git clone {address} && cd optstate\n" in (root / page).read_text()


def test_the_readme_opens_with_the_two_commands(root: Path) -> None:
    """CI runs the second, and both stay one line."""
    opening = (root / "README.md").read_text().partition("\n## ")[0]
    demo, tests = (f'pip install "nox[uv]" && nox -s {name}' for name in ("demo", "tests"))
    assert f"```\n{demo}\n```\n\n```\n{tests}\n```\n" in opening
    assert (root / ".ci" / "run").read_text().endswith(f"\n{tests}\n")
