"""The libraries whose checkpoints can be read. Imports nothing, so that ``--help`` is fast."""

LIBRARIES = ("torch", "torchao", "bitsandbytes", "turboadam-0.2", "torchastic", "optstate")
WRITTEN_BY_OTHERS = ("torchao", "bitsandbytes", "turboadam-0.2", "torchastic")
"""Those that can be read and not written."""
