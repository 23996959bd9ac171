"""Imports every module of one distribution; `isolated` runs it where only its wheel is installed.

Modules that need an extra are known: for those, only the extra's import may be what is missing.
"""

import importlib
import pkgutil
import sys

FROM_EXTRAS = {
    "optstate_codecs": {"triton"},
    "lowbit_adam": set(),
    "turboadam": set(),
    "stochbf16": set(),
    "optstate_wrap": {"matplotlib"},
    "optstate": {
        "torch",
        "matplotlib",
        "optstate_codecs",
        "lowbit_adam",
        "turboadam",
        "stochbf16",
        "optstate_wrap",
    },
}


def main(package: str) -> None:
    root = importlib.import_module(package)
    assert "site-packages" in str(root.__file__), f"{root.__file__}: not the installed wheel"
    for name in getattr(root, "__all__", ()):
        getattr(root, name)
    modules = [m.name for m in pkgutil.walk_packages(root.__path__, f"{package}.")]
    for module in modules:
        if module.endswith("__main__"):
            continue
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in FROM_EXTRAS[package]:
                raise
    sys.stdout.write(f"{package} {root.__version__}: {len(modules)} modules\n")


if __name__ == "__main__":
    main(sys.argv[1])
