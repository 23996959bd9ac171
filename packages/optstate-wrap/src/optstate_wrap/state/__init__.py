"""The state of a wrapped optimizer: how it is stored, read, saved and loaded."""
