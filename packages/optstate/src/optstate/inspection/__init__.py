"""``optstate inspect``: formats, bits and steps of the optimizer state in a file."""
