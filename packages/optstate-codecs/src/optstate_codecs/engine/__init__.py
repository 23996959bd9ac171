"""Runs one step over tensors, a rule and formats; knows nothing of optimizers."""

from optstate_codecs.engine.executor import BACKENDS, ResidentExecutor
from optstate_codecs.engine.request import ParamStep, StepRequest, trainable

__all__ = ["BACKENDS", "ParamStep", "ResidentExecutor", "StepRequest", "trainable"]
