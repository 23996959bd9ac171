"""Memory of GPUs. Imports nothing, so that ``--help`` is fast."""

CARDS = (12, 16, 24, 32, 40, 48, 80, 96, 141)
"""GB, of 10^9 bytes; cards have a little more than their name says, which the driver takes."""
