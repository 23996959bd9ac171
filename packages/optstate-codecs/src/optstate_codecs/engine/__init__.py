"""Runs one step over tensors, a rule and formats; knows nothing of optimizers."""

from optstate_codecs.engine.executor import BACKENDS, Executor, ResidentExecutor
from optstate_codecs.engine.request import ParamStep, StepRequest, trainable

__all__ = ["BACKENDS", "Executor", "ParamStep", "ResidentExecutor", "StepRequest", "trainable"]
