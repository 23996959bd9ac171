"""Adam and AdamW with 8-bit state: change one line, keep a quarter of the optimizer's memory."""

from lowbit_adam.adam import Adam8bit, AdamW8bit

__version__ = "0.1.0"

__all__ = ["Adam8bit", "AdamW8bit"]
