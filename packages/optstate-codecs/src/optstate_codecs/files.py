"""Opens, reads and replaces files that others may have put something else in place of.

A folder of checkpoints may be one that other users write to. So a file is opened only if it is a
regular file itself: a symbolic link would lead elsewhere, opening a pipe would wait forever, and a
device has no end. JSON is refused where an object has a key twice, since readers differ in which
of the values they take.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["open_regular", "parse_json", "read_text", "replacement"]

# missing on some systems, where links are followed and no pipe lies in a folder
_NO_LINK: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def open_regular(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a regular file and return its descriptor.

    Args:
        path: of the file. The last component may not be a symbolic link; folders may be.
        flags: as for ``os.open``.
        mode: of a file that this makes, less the process's mask.

    Raises:
        OSError: it is a link, a folder, a pipe or a device, or cannot be opened; the message says
            which.
    """
    try:
        file = os.open(path, flags | _NO_LINK, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(
                errno.ELOOP,
                f"{path}: is a symbolic link, must be a regular file; give the path of the file "
                "that it leads to",
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, f"{path}: is no regular file, must be one")
    return file


def read_text(path: Path, limit: int) -> str:
    """The text of a regular file.

    Raises:
        OSError: as ``open_regular``.
        ValueError: it has more than ``limit`` bytes, or is not UTF-8.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{size} bytes, must be at most {limit}")
        return file.read(limit).decode()


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, nested too deep, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r:.40} is there twice")
    return found


@contextmanager
def replacement(path: Path, suffix: str, sync: bool) -> Iterator[Path]:
    """A new file that takes the place of another one when the block ends without an error.

    What is there under the name of the new file is removed first: the rest of an earlier attempt,
    or a link by which writing would change a file elsewhere.

    Args:
        path: the file to replace; if it is a link, the link is replaced.
        suffix: of the new file's name.
        sync: whether the new content is on the disk before it replaces the old one.

    Yields:
        The path of the new file, which is empty.

    Raises:
        OSError: a file cannot be made, or moved to ``path``.
    """
    new = path.with_name(path.name + suffix)
    new.unlink(missing_ok=True)
    os.close(open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        yield new
        if sync:
            with new.open("rb") as file:
                os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
