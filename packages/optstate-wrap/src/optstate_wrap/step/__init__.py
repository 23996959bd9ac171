"""A step of a wrapped optimizer: in chunks, fused, and undone where it fails."""
