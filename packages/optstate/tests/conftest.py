"""What several test files need: a small text, small settings, one small finished comparison."""

import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from optstate.demo.compare import Comparison, compare
from optstate.demo.data import Corpus
from optstate.demo.settings import Settings

# a plain module of tests, which importlib mode does not put on the path
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_bytes(b"Full fathom five thy father lies; of his bones are coral made.\n" * 60)
    return path


@pytest.fixture(scope="session")
def settings(text: Path) -> Settings:
    return Settings(
        steps=6, batch=4, context=16, width=32, depth=1, evaluations=2, lr=1e-2, text=text
    )


@pytest.fixture(scope="session")
def corpus(text: Path, settings: Settings) -> Corpus:
    return Corpus.from_documents([text.read_bytes()], settings.context)


@pytest.fixture(scope="session")
def comparison(corpus: Corpus, settings: Settings) -> Comparison:
    optimizers = [("torch.optim.AdamW", torch.optim.AdamW), ("torch.optim.SGD", torch.optim.SGD)]
    return compare(optimizers, corpus, settings, Console(quiet=True))
