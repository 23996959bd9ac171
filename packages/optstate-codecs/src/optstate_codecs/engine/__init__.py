"""Runs one step over tensors, a rule and formats; knows nothing of optimizers."""

from optstate_codecs.engine.session import BACKENDS, Session
from optstate_codecs.engine.unit import Job, Unit, trainable

__all__ = ["BACKENDS", "Job", "Session", "Unit", "trainable"]
