"""How the sources hang together: no import circles, no private names of others, short files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
LONGEST = 400


def modules() -> dict[str, Path]:
    """Every module of every distribution, by its dotted name."""
    found = {}
    for root in sorted(ROOT.glob("packages/*/src")):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that a module names in an import, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in MODULES:
                    yield full
                elif node.module in MODULES:
                    yield node.module


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again last; none: empty."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for other in sorted(graph.get(name, ())):
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    return next((found for name in graph if (found := visit(name))), [])


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module defines: functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


PRIVATE = {name: defined(tree) for name, tree in TREES.items()}
#: but for those that torch's classes have too
EVERY_PRIVATE = set().union(*PRIVATE.values()) - {*dir(torch.Tensor), *dir(torch.optim.Optimizer)}


def reaches(name: str, tree: ast.AST) -> Iterator[str]:
    """Uses of private names that other modules of ours define, and this one does not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in EVERY_PRIVATE - PRIVATE[name]:
            inner = node.value
            own = isinstance(inner, ast.Name) and inner.id in ("self", "cls")
            parent = isinstance(inner, ast.Call) and ast.unparse(inner) == "super()"
            # a subclass's own view of its parent is still a reach into another module
            yield f"{name}:{node.lineno}: {ast.unparse(node)}" + (
                " (of a parent)" if own or parent else ""
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "") in MODULES:
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    yield f"{name}:{node.lineno}: from {node.module} import {alias.name}"


def test_the_circle_finder_finds_circles() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_there_are_no_import_circles() -> None:
    """Not within functions and not under TYPE_CHECKING either."""
    graph = {name: set(imports(tree)) - {name} for name, tree in TREES.items()}
    assert sum(map(len, graph.values())) > 300
    assert circle(graph) == []


def test_no_module_uses_private_names_of_another() -> None:
    assert [use for name, tree in TREES.items() for use in reaches(name, tree)] == []


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short_and_say_what_they_hold(name: str) -> None:
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= LONGEST
    assert (ast.get_docstring(TREES[name]) or "").strip()


def used_by(*folders: str) -> set[str]:
    """The modules and folders beside these of ``optstate_codecs`` that their modules import."""
    found = set()
    for name, tree in TREES.items():
        if name.split(".")[:2] in [["optstate_codecs", folder] for folder in folders]:
            found |= {other.split(".")[1] for other in imports(tree) if other.count(".")}
    return found - set(folders)


def test_formats_rules_and_writes_know_nothing_of_the_engine() -> None:
    used = used_by("formats", "rules", "writes")
    assert used >= {"rounding", "checks"}
    folders = {path.parent.name for path in MODULES.values() if path.name == "__init__.py"}
    assert used & folders <= {"triton_lib"}
    assert not used & {"optimizer", "parameters", "views", "memory"}


def test_the_engine_knows_nothing_of_optimizers() -> None:
    used = used_by("engine")
    assert used >= {"formats", "rules", "writes"}
    assert not used & {"optimizer", "parameters", "offloading", "views", "memory", "testing"}


def test_the_module_map_has_every_folder_and_names_what_exists() -> None:
    text = (ROOT / "docs" / "concepts" / "module-map.md").read_text()
    sections = re.split(r"^## Folders of (\w+)$", text, flags=re.MULTILINE)[1:]
    for package, section in zip(sections[::2], sections[1::2], strict=True):
        (source,) = ROOT.glob(f"packages/*/src/{package}")
        table = section.partition("| folder |")[2].partition("\n\n")[0]
        folders = {path.parent for path in source.glob("*/**/__init__.py")}
        expected = {f"{folder.relative_to(source).as_posix()}/" for folder in folders}
        assert set(re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE)) == expected
    sources = [path for path in ROOT.glob("packages/*/src/*") if path.name in sections]
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    assert len(named) > 25
    assert {path for path in named if not any((s / path).exists() for s in sources)} == set()
