"""Imports optional modules; if one is missing, the error says which extra installs it."""

import importlib
from types import ModuleType

EXTRA_OF = {
    "torch": "codecs",
    "matplotlib": "demo",
    "optstate_codecs": "codecs",
    "safetensors": "codecs",
    "lowbit_adam": "lowbit-adam",
    "turboadam": "turboadam",
    "stochbf16": "stochbf16",
    "optstate_wrap": "wrap",
}
"""The extra of this distribution that installs each optional module, by top-level name."""

SIBLINGS_OF = {
    "codecs": ("optstate-codecs",),
    "lowbit-adam": ("optstate-codecs", "lowbit-adam"),
    "turboadam": ("optstate-codecs", "turboadam"),
    "stochbf16": ("optstate-codecs", "stochbf16"),
    "wrap": ("optstate-codecs", "optstate-wrap"),
    "demo": ("optstate-codecs", "lowbit-adam"),
    "all": ("optstate-codecs", "lowbit-adam", "turboadam", "stochbf16", "optstate-wrap"),
}
"""The distributions of the family that each extra installs, with their dependencies."""


class MissingExtra(RuntimeError):
    """A module that only an extra of this distribution installs could not be imported."""


def require(module: str, extra: str | None = None) -> ModuleType:
    """Imports an optional module.

    Args:
        module: Its dotted name. The first part must be a key of `EXTRA_OF`.
        extra: The extra that the error names; None: the one that installs the module alone.

    Raises:
        MissingExtra: The module is not installed; the message says how to install it. An import
            error from *inside* the module propagates unchanged.

    Examples:
        >>> require("matplotlib.pyplot").figure()  # doctest: +SKIP
    """
    root = module.partition(".")[0]
    extra = extra or EXTRA_OF[root]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        raise MissingExtra(
            f"{root} is not installed; the extra {extra!r} brings it: {install_command(extra)}"
        ) from error


def install_command(extra: str) -> str:
    """The command that installs an extra, from an index or by path from a clone.

    In a clone all paths are given at once, so that pip takes none of them from an index.
    """
    paths = " ".join(f"./packages/{sibling}" for sibling in SIBLINGS_OF[extra])
    return (
        f'pip install "optstate[{extra}]", or'
        f' in a clone of the repository, pip install {paths} "./packages/optstate[{extra}]"'
    )
