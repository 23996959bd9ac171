"""Compiles C source with the system compiler; built libraries are cached on disk."""

from __future__ import annotations

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
from typing import Any

__all__ = ["CannotBuild", "build", "compiler"]

# vectorised code must give the same bits: no contraction of a * b + c, and integers that wrap
FLAGS = ["-O3", "-march=native", "-shared", "-fPIC", "-fwrapv", "-fno-strict-aliasing"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-mprefer-vector-width=512")


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
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "optstate"


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


def build(source: str) -> Any:
    """Compile ``source``, or load its cached library, and return its function ``run``.

    Raises:
        CannotBuild: there is no compiler, or it fails.
    """
    command = compiler()
    try:
        identity = _identity(tuple(command))
        name = hashlib.sha256((identity + source).encode()).hexdigest()[:32]
        folder = cache_folder()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="optstate-"))
        library = folder / f"{name}.so"
        if not library.exists():
            _compile(command, source, library)
        run = ctypes.CDLL(str(library)).run
    except OSError as error:
        raise CannotBuild(str(error)) from error
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
            done = subprocess.run(whole, capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            raise CannotBuild(f"{shlex.join(command)} fails: {done.stderr.strip()[:300]}")
        # atomic: processes that build the same source at once replace equal files
        os.replace(made, library)
