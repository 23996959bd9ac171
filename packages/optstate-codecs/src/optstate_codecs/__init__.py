"""Formats, rules and the engine behind the optstate family of optimizers.

An optimizer here is an update rule (``rules``) x a format for each moment (``formats``) x a
parameter write (``writes``); ``CodedOptimizer`` puts the three together.
"""

from optstate_codecs.formats import (
    BF16,
    FP8,
    FP32,
    CoState,
    Dynamic8,
    Format,
    Int4,
    Int8,
    Minifloat,
    OneQ,
    parse_format,
)
from optstate_codecs.gradients.release import GradientRelease
from optstate_codecs.memory import (
    MemoryReport,
    memory_report,
    predicted_state_bytes,
    state_bytes,
)
from optstate_codecs.offloading import (
    Snapshot,
    offload,
    offloaded_class,
    snapshot,
    synchronize,
)
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.rounding import stochastic_round_bf16
from optstate_codecs.rules import Adam, Rule
from optstate_codecs.state_file import load_safetensors, save_safetensors
from optstate_codecs.typed import typed_arguments
from optstate_codecs.views import decode_state, master_state_dict, master_weights

__version__ = "0.1.0"

__all__ = [
    "BF16",
    "FP8",
    "FP32",
    "Adam",
    "CoState",
    "CodedOptimizer",
    "Dynamic8",
    "Format",
    "GradientRelease",
    "Int4",
    "Int8",
    "MemoryReport",
    "Minifloat",
    "OneQ",
    "Rule",
    "Snapshot",
    "decode_state",
    "load_safetensors",
    "master_state_dict",
    "master_weights",
    "memory_report",
    "offload",
    "offloaded_class",
    "parse_format",
    "predicted_state_bytes",
    "save_safetensors",
    "snapshot",
    "state_bytes",
    "stochastic_round_bf16",
    "synchronize",
    "typed_arguments",
]
