"""The step of a wrapped optimizer: checks, batches, the fused step, and undoing a failed step."""
