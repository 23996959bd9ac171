"""Loading what the umbrella does not depend on, with a way out when it is not there."""

import importlib
from types import ModuleType

EXTRA_OF = {
    "torch": "demo",
    "matplotlib": "demo",
    "optstate_codecs": "codecs",
    "lowbit_adam": "lowbit-adam",
}
"""The extra of this distribution that brings each optional module, by top-level import name."""


class MissingExtra(RuntimeError):
    """A module that only an extra of this distribution installs could not be imported."""


def require(module: str) -> ModuleType:
    """Imports an optional module, or says how to install it.

    Args:
        module: Its dotted name. The first part must be a key of `EXTRA_OF`.

    Raises:
        MissingExtra: The module is not installed. An import that fails *inside* the module is not
            hidden: it propagates as it is.

    Example:
        >>> require("matplotlib.pyplot").figure()  # doctest: +SKIP
    """
    root = module.partition(".")[0]
    extra = EXTRA_OF[root]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        raise MissingExtra(
            f'{root} is not installed: pip install "optstate[{extra}]" brings it'
        ) from error
