"""The engine: runs the step of a rule over parameters and coded state, on any backend."""

from optstate_codecs.engine.executor import BACKENDS, Executor, ResidentExecutor
from optstate_codecs.engine.request import ParamStep, StepRequest, trainable

__all__ = ["BACKENDS", "Executor", "ParamStep", "ResidentExecutor", "StepRequest", "trainable"]
