"""Adam and AdamW with 8-bit, FP8 and 4-bit state: change one line, keep an eighth of the memory."""

from lowbit_adam.adam import Adam4bit, Adam8bit, AdamFp8, AdamW4bit, AdamW8bit, AdamWFp8
from lowbit_adam.convert import from_bitsandbytes, from_torchao

__version__ = "0.1.0"

__all__ = [
    "Adam4bit",
    "Adam8bit",
    "AdamFp8",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFp8",
    "from_bitsandbytes",
    "from_torchao",
]
