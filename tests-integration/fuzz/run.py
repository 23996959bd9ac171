"""Coverage-guided fuzzing of the three readers of checkpoints.

    nox -s fuzz -- --seconds 200            each reader for 200 seconds
    nox -s fuzz -- --seconds 60 --target manifest

Each target runs in a process of its own, since libFuzzer ends the process. An input that breaks the
contract (see ``contract.py``) is kept in ``--findings``, once for each kind of error, and fuzzing
goes on. Exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGETS = ("manifest", "header", "state_dict")
# an input that takes longer, or more memory, is a finding; in seconds and MiB
TIMEOUT, MEMORY = 20, 4096
# tables of inputs in test files, each of which is refused; REPLACED is for two files
TABLES = {"MANIFESTS", "TEXTS", "HEADERS", "HOSTILE", "REPLACED", "BROKEN", "OTHERS"}
TABLES |= {"PLAIN_FAULTS", "PACKED_FAULTS"}


def fuzz(name: str, seconds: int, findings: Path) -> None:
    """Fuzz one target until the time is over; does not return."""
    import atheris

    with atheris.instrument_imports(include=["optstate_codecs", "optstate_wrap"]):
        target = importlib.import_module(name).Target()
    import torch

    torch.set_num_threads(1)
    corpus = Path(tempfile.mkdtemp(prefix=f"corpus-{name}-"))
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    seen: set[str] = set()
    runs = 0

    def one(data: bytes) -> None:
        nonlocal runs
        runs += 1
        try:
            target.one(data)
        except Exception as error:
            # numbers and places differ between inputs of one cause
            key = re.sub(r"0x\w+|\d+|'[^']*'", "", str(error).splitlines()[0])[:120]
            if key not in seen:
                seen.add(key)
                stem = hashlib.sha256(key.encode()).hexdigest()[:12]
                (findings / f"{name}-{stem}.input").write_bytes(data)
                (findings / f"{name}-{stem}.txt").write_text(str(error))
        if runs % 50 == 0:
            counts = {"refused": target.refused, "loaded": target.loaded, "runs": runs}
            (findings / f"{name}.counts").write_text(json.dumps(counts))

    options = [f"-max_total_time={seconds}", f"-timeout={TIMEOUT}", f"-rss_limit_mb={MEMORY}"]
    options += ["-print_final_stats=1", "-max_len=8192", f"-artifact_prefix={findings}/{name}-"]
    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


def measured(name: str, seconds: int, findings: Path) -> dict[str, Any]:
    """Fuzz a target in a process of its own, and read what libFuzzer prints."""
    command = [sys.executable, __file__, "--inside", name, "--seconds", str(seconds)]
    command += ["--findings", str(findings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    coverage = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    runs = re.findall(r"number_of_executed_units:\s*(\d+)", done.stderr)
    peak = re.findall(r"peak_rss_mb:\s*(\d+)", done.stderr)
    counts: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):
        counts = json.loads((findings / f"{name}.counts").read_text())
    if not runs or not coverage:
        print(done.stdout[-2000:], done.stderr[-4000:])
        raise SystemExit(f"{name}: libFuzzer printed no statistics, exit code {done.returncode}")
    kept = [p.name for p in findings.glob(f"{name}-*") if p.suffix != ".txt"]
    edges, features, corpus = map(int, coverage[-1])
    return {
        "target": name,
        "seconds": seconds,
        "executions": int(runs[-1]),
        "refused": counts.get("refused", 0),
        "loaded": counts.get("loaded", 0),
        "edges": edges,
        "features": features,
        "features of the seeds": int(coverage[0][1]),
        "corpus": corpus,
        "peak MiB": int(peak[-1]) if peak else None,
        "findings": sorted(kept),
    }


def inputs_in_tests() -> dict[str, int]:
    """How many broken and hostile inputs the tables of the test files hold, by file."""
    counts = {}
    for path in sorted(HERE.parents[1].glob("packages/*/tests/test_*.py")):
        tables = [
            len(node.value.keys) * (2 if node.targets[0].id == "REPLACED" else 1)
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Dict)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in TABLES
        ]
        if tables:
            counts[f"{path.parents[1].name}: {path.name}"] = sum(tables)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=200, help="for each target")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--findings", type=Path, help="folder for inputs that break the contract")
    parser.add_argument("--results", type=Path, help="a file for the result, as JSON")
    parser.add_argument("--inside", choices=TARGETS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    findings = options.findings or Path(tempfile.mkdtemp(prefix="fuzz-findings-"))
    findings.mkdir(parents=True, exist_ok=True)
    if options.inside:
        fuzz(options.inside, options.seconds, findings)
        return
    import torch

    rows = []
    for name in options.target or TARGETS:
        row = measured(name, options.seconds, findings)
        rows.append(row)
        print(
            f"{name}: {row['executions']} executions in {row['seconds']} s, {row['refused']} "
            f"refused, {row['loaded']} loaded, {row['features']} coverage features "
            f"({row['features of the seeds']} at first), {len(row['findings'])} findings",
            flush=True,
        )
    setup = {
        "fuzzer": f"atheris {importlib.metadata.version('atheris')}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        "timeout_s": TIMEOUT,
        "memory_limit_MiB": MEMORY,
    }
    if options.results:
        result = {"setup": setup, "rows": rows, "inputs in tests": inputs_in_tests()}
        options.results.write_text(json.dumps(result, indent=1) + "\n")
    if any(row["findings"] for row in rows):
        for path in sorted(findings.glob("*.txt")):
            print(f"--- {path.name}\n{path.read_text()[:3000]}")
        sys.exit(f"findings in {findings}")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
