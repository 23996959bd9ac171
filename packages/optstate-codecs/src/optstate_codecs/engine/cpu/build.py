"""Compiles C++ source with the system compiler, and keeps the built libraries on disk.

A library's name is a hash of source, compiler, flags and processor. Its last 32 bytes are the
SHA-256 of the others, so that a damaged file is found out before it is loaded, and built again.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, PIPE
from threading import Thread
from typing import Any

__all__ = ["BackgroundBuild", "CannotBuild", "build", "compiler", "find"]

# vectorised code must give the same bits: no contraction of a * b + c, and integers that wrap
FLAGS = ["-O3", "-march=native", "-shared", "-fPIC", "-fwrapv", "-fno-strict-aliasing"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-mprefer-vector-width=512")
DIGEST = 32


class CannotBuild(Exception):
    """There is no working compiler."""


def compiler() -> list[str]:
    """The command of a C++ compiler: the value of CXX, or the first of g++, clang++ and c++.

    Options in CXX override ``FLAGS``: CXX="g++ -march=x86-64" builds for every 64-bit x86
    processor.

    Raises:
        CannotBuild: none of these programs exists.
    """
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "clang++", "c++"]:
        parts = shlex.split(command)
        if parts and shutil.which(parts[0]):
            return parts
    raise CannotBuild(f"CXX={named!r} is not a program" if named else "no g++, clang++ or c++")


def cache_folder() -> Path:
    """The folder of built libraries, which only this user can write to.

    It is ``optstate`` in the user's cache folder; if that cannot be made, or others may write to
    it, a folder of this process.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the specification of this variable has relative paths ignored
    parent = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~"), ".cache")
    folder = parent / "optstate"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return _own_folder()
    mine = not hasattr(os, "getuid") or (
        found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK)
    )
    return folder if mine else _own_folder()


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="optstate-")


def _own_folder() -> Path:
    return Path(_temporary().name)


@cache
def _identity(command: tuple[str, ...]) -> str:
    """Compiler, processor and flags as text: the part of the cache key besides the source."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        processor = platform.processor()
    return "\n".join([*command, version, processor, platform.machine(), *FLAGS])


def _library(command: list[str], source: str) -> Path:
    identity = _identity(tuple(command))
    return cache_folder() / f"{hashlib.sha256((identity + source).encode()).hexdigest()[:32]}.so"


def find(source: str) -> Any | None:
    """The function ``run`` of ``source`` if a library of it was built before, else None.

    Raises:
        CannotBuild: there is no compiler, on which the library's name depends.
    """
    try:
        return _load(_library(compiler(), source))
    except OSError as error:
        raise CannotBuild(str(error)) from error


def build(source: str) -> Any:
    """Compile ``source``, or load its cached library, and return its function ``run``.

    Raises:
        CannotBuild: there is no compiler, or it fails.
    """
    command = compiler()
    try:
        library = _library(command, source)
        run = _load(library)
        if run is None:
            _compile(command, source, library)
            run = _load(library)
    except OSError as error:
        raise CannotBuild(str(error)) from error
    if run is None:
        raise CannotBuild(f"{library} was changed while it was loaded")
    return run


class BackgroundBuild:
    """A ``build`` in a thread of its own, which ends with the process."""

    def __init__(self, source: str) -> None:
        self._run: Any = None
        self._error: CannotBuild | None = None
        self._thread = Thread(target=self._build, args=(source,), daemon=True)
        self._thread.start()
        _threads[self._thread] = os.getpid()

    def _build(self, source: str) -> None:
        try:
            self._run = build(source)
        except CannotBuild as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Whether ``result`` does not wait."""
        return not self._thread.is_alive()

    def result(self) -> Any:
        """Wait for the build and return the function ``run``.

        Raises:
            CannotBuild: there is no compiler, or it fails.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._run


# what runs in the background, and the process that it belongs to: a fork has copies of these
_threads: dict[Thread, int] = {}
_compilers: dict[subprocess.Popen[str], int] = {}


@atexit.register
def _stop() -> None:
    """Stop compilers and let their threads remove their files."""
    for process, owner in list(_compilers.items()):
        if owner == os.getpid():
            process.kill()
    for thread, owner in _threads.items():
        if owner == os.getpid():
            thread.join(timeout=1)


def _load(library: Path) -> Any | None:
    """The function ``run`` of a library, with the library as an attribute.

    None where the file is missing or damaged.
    """
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
        return None
    loaded = ctypes.CDLL(str(library))
    run: Any = loaded.run
    run.library = loaded
    run.argtypes = [ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 3, ctypes.c_int]
    run.restype = None
    return run


def _with_flags(command: list[str]) -> list[str]:
    """``command`` with our flags before its own, so that its own override them."""
    own = next((at for at, part in enumerate(command) if part[:1] == "-"), len(command))
    return [*command[:own], *FLAGS, *command[own:]]


def _compile(command: list[str], source: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        text, made = Path(folder, "step.cpp"), Path(folder, "step.so")
        text.write_text(source)
        # without OpenMP the function is built for one thread
        for threads in (["-fopenmp"], []):
            whole = [*_with_flags(command), *threads, str(text), "-o", str(made)]
            with subprocess.Popen(whole, stdout=DEVNULL, stderr=PIPE, text=True) as process:
                _compilers[process] = os.getpid()
                _, errors = process.communicate()
                del _compilers[process]
            if process.returncode <= 0:
                break
        if process.returncode:
            raise CannotBuild(f"{shlex.join(command)} fails: {errors.strip()[:300]}")
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        # atomic: processes that build the same source at once replace equal files
        os.replace(made, library)
