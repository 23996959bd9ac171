"""The options of the demo, checked before anything is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

BASELINE = "torch.optim.AdamW"
DEFAULT_OPTIMIZERS = ("lowbit_adam.AdamW8bit",)


@dataclass(frozen=True)
class Settings:
    """All options of a comparison; runs with equal settings compute the same results.

    Attributes:
        optimizers: Names of the optimizers compared with the baseline, as `resolve` takes them.
        steps: Optimizer steps of each run, at least 1.
        device: A torch device, such as ``cpu``, ``cuda`` or ``cuda:1``.
        seed: Seeds initialisation and data order, from 0 to 2**63 - 1.
        lr: Peak learning rate, above 0.
        batch: Sequences a step, at least 1.
        context: Bytes a sequence, at least 2.
        width: Model width, a positive multiple of 32 (the size of a head).
        depth: Number of blocks, at least 1.
        evaluations: How often each run is validated, at least 1 (the last is at the end).
        validation_batches: Batches that a validation averages over, at least 1.
        text: A file to learn instead of Shakespeare's plays.
        optim_args: Arguments of the optimizers that are compared, as ``name=value, ...``.

    Raises:
        ValueError: A number outside its range; the message names it.
    """

    optimizers: tuple[str, ...] = DEFAULT_OPTIMIZERS
    steps: int = 300
    device: str = "cpu"
    seed: int = 0
    lr: float = 1e-3
    batch: int = 48
    context: int = 64
    width: int = 128
    depth: int = 3
    evaluations: int = 6
    validation_batches: int = 12
    text: Path | None = None
    optim_args: str = ""

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1,
            "batch": 1,
            "context": 2,
            "width": 32,
            "depth": 1,
            "evaluations": 1,
            "validation_batches": 1,
        }
        for name, low in at_least.items():
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"{name}={value}: must be at least {low}")
        if self.width % 32:
            raise ValueError(f"width={self.width}: must be a multiple of 32, the size of a head")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be from 0 to 2**63 - 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr}: must be a finite number above 0")


def picture_path(out: Path) -> Path:
    """The PNG that ``--out`` means: itself, or ``demo.png`` in the folder it names.

    Raises:
        ValueError: A file name that ends in something other than ``.png``.
    """
    if out.is_dir() or not out.suffix:
        return out / "demo.png"
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: must be a folder or a file name ending in .png")
    return out
