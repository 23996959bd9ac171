"""Runs the command in this process, as a user would in a shell."""

import json
from typing import Any

from typer.testing import CliRunner

from optstate.cli import app


def run(*args: Any) -> tuple[int, str]:
    """Exit code and everything printed, without the line breaks of rich's boxes."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    words = result.output.replace("│", " ").split()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(words)


def json_of(*args: Any) -> Any:
    """What the command prints with ``--json``."""
    result = CliRunner().invoke(app, [*map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
