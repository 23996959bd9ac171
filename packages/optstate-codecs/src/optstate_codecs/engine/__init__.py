"""Runs one step over tensors, a rule and formats; knows nothing of optimizers."""

from optstate_codecs.engine.eager import step
from optstate_codecs.engine.unit import Unit

__all__ = ["Unit", "step"]
