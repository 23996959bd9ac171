"""The GitHub workflow runs sessions that exist, on the versions that the noxfile names."""

import ast
import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text())


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def constant(name: str) -> tuple[str, ...]:
    """A constant of the noxfile."""
    (value,) = (
        node.value
        for node in NOXFILE.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    return ast.literal_eval(value)


def sessions() -> set[str]:
    """The sessions of the noxfile."""
    return {
        node.name
        for node in NOXFILE.body
        if isinstance(node, ast.FunctionDef)
        and any("nox.session" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def commands(workflow: dict[Any, Any]) -> dict[str, list[list[str]]]:
    """The words of each nox command, by job."""
    return {
        name: [
            shlex.split(re.sub(r"\$\{\{ *([\w.]+) *\}\}", r"{\1}", step["run"]))
            for step in job["steps"]
            if step.get("run", "").startswith("nox")
        ]
        for name, job in workflow["jobs"].items()
    }


def test_sessions_of_the_workflow_exist(workflow: dict[Any, Any]) -> None:
    used = [
        word
        for found in commands(workflow).values()
        for command in found
        if "-s" in command
        for word in command[command.index("-s") + 1 : [*command, "--"].index("--")]
    ]
    assert set(used) >= {"lint", "types", "integration", "docs", "release_check"}
    assert set(used) <= sessions()


def test_every_check_of_ci_is_in_the_workflow(workflow: dict[Any, Any]) -> None:
    """What `nox -s tests` requires runs here too, suites by the matrix."""
    (required,) = (
        ast.literal_eval(keyword.value)
        for node in NOXFILE.body
        if isinstance(node, ast.FunctionDef) and node.name == "tests"
        for keyword in node.decorator_list[0].keywords
        if keyword.arg == "requires"
    )
    runs = {word for found in commands(workflow).values() for words in found for word in words}
    # release_check requires these two
    assert set(required) - {"build", "isolated", "units"} <= runs
    assert "--python" in runs


def test_the_matrix_is_the_noxfile_s(workflow: dict[Any, Any]) -> None:
    matrix = workflow["jobs"]["unit"]["strategy"]["matrix"]
    assert tuple(matrix["python"]) == constant("PYTHONS")
    assert tuple(matrix["torch"]) == constant("TORCHES")
    ((*_, tag, python, version, missing),) = commands(workflow)["unit"]
    assert tag == "torch-{matrix.torch}"
    assert [python, version] == ["--python", "{matrix.python}"]
    assert missing == "--error-on-missing-interpreters"
    assert 'tags=[f"torch-{torch}"]' in (ROOT / "noxfile.py").read_text()


def test_releases_are_published_after_all_checks_and_without_passwords(
    workflow: dict[Any, Any],
) -> None:
    jobs = workflow["jobs"]
    publish = jobs["publish"]
    assert publish["if"] == "github.ref_type == 'tag'"
    assert publish["permissions"] == {"id-token": "write"}
    assert set(publish["needs"]) == set(jobs) - {"publish", "deploy"}
    uses = publish["steps"][-1]
    assert uses["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert set(uses["with"]) == {"packages-dir"}
    # only this job and the site's may act for the repository
    assert [name for name, job in jobs.items() if "permissions" in job] == ["deploy", "publish"]
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("tag", ["turboadam-v1.0.0", "optstate-codecs-v0.1.0"])
def test_tags_of_every_distribution_start_it(workflow: dict[Any, Any], tag: str) -> None:
    # YAML 1.1 reads the key "on" as true
    patterns = workflow[True]["push"]["tags"]
    assert any(fnmatchcase(tag, pattern) for pattern in patterns)
    assert not any(fnmatchcase("main", pattern) for pattern in patterns)
