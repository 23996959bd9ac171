"""Adam and AdamW with 8-bit, FP8 and 4-bit state; Lion and SGD with 8-bit state."""

from lowbit_adam.adam import (
    Adam4bit,
    Adam8,
    Adam8bit,
    AdamFp8,
    AdamW4bit,
    AdamW8,
    AdamW8bit,
    AdamWFp8,
)
from lowbit_adam.convert import from_bitsandbytes, from_torchao
from lowbit_adam.momentum import SGD8, Lion8, Lion8bit, SGD8bit

__version__ = "0.1.0"

__all__ = [
    "SGD8",
    "Adam4bit",
    "Adam8",
    "Adam8bit",
    "AdamFp8",
    "AdamW4bit",
    "AdamW8",
    "AdamW8bit",
    "AdamWFp8",
    "Lion8",
    "Lion8bit",
    "SGD8bit",
    "from_bitsandbytes",
    "from_torchao",
]
