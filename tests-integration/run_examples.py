"""Runs the Python of pages: the blocks of a page are one program, which runs from top to bottom.

python tests-integration/run_examples.py README.md ...
"""

import sys
from pathlib import Path


def examples(text: str) -> str:
    """The Python of a page, each line where it is in the page, so that tracebacks point there."""
    program, inside = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        program.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(program)


def run(page: Path) -> None:
    """Run the program of a page in the current folder."""
    exec(compile(examples(page.read_text()), str(page), "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        run(Path(argument))
