"""Writes files whole or not at all, even if the command is interrupted."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def check_folder(folder: Path) -> None:
    """Checks that a folder can be made and written to, and leaves nothing behind.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    made, probe = _make(folder), _beside(folder / "optstate")
    try:
        probe.touch()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        _remove(made)


def write_files(files: Mapping[Path, bytes]) -> None:
    """Writes all files and makes their folders; an interruption leaves only whole files."""
    made: list[Path] = []
    parts = {path: _beside(path) for path in files}
    try:
        for path in files:
            made += _make(path.parent)
        for path, content in files.items():
            parts[path].write_bytes(content)
        for path, part in parts.items():
            part.replace(path)
    except BaseException:
        for part in parts.values():
            with suppress(OSError):
                part.unlink(missing_ok=True)
        _remove(made)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path beside a file to write to; it replaces the file when the block has ended well.

    The file's folder is made. After an exception there is nothing new.
    """
    made, part = _make(path.parent), _beside(path)
    try:
        yield part
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        _remove(made)
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _make(folder: Path) -> list[Path]:
    """Makes a folder; returns the folders that were made, the outermost first."""
    missing = [at for at in (folder, *folder.parents) if not at.exists()][::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except BaseException:
        _remove(missing)
        raise
    return missing


def _remove(made: list[Path]) -> None:
    """Removes those folders that are empty, the innermost first."""
    for folder in reversed(made):
        with suppress(OSError):
            folder.rmdir()
