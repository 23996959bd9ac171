"""Wraps any PyTorch optimizer so that its state is stored compressed, or in host memory."""

from optstate_codecs.errors import StepError
from optstate_wrap.activations import checkpoint_sequential_modules, enable_gradient_checkpointing
from optstate_wrap.classes import wrapped_class
from optstate_wrap.codecs import (
    BF16Codec,
    Codec,
    FP16Codec,
    FP32Codec,
    IdentityCodec,
    Int8MomentumCodec,
)
from optstate_wrap.cpu.offload import CPUOffloadOptimizer
from optstate_wrap.metrics import MetricsWriter, plot_memory
from optstate_wrap.offload.optimizer import OffloadOptimizer
from optstate_wrap.policies import AdaptiveWarmupPolicy, ConfigurablePolicy, Policy, WarmupPolicy
from optstate_wrap.presets import (
    auto_wrap,
    make_low_memory_policy,
    wrap,
    wrap_low_memory_adamw,
    wrap_max_compression_adamw,
)
from optstate_wrap.report import WrapperMemoryReport
from optstate_wrap.wrapper import OptimizerWrapper

__version__ = "0.1.0"

__all__ = [
    "AdaptiveWarmupPolicy",
    "BF16Codec",
    "CPUOffloadOptimizer",
    "Codec",
    "ConfigurablePolicy",
    "FP16Codec",
    "FP32Codec",
    "IdentityCodec",
    "Int8MomentumCodec",
    "MetricsWriter",
    "OffloadOptimizer",
    "OptimizerWrapper",
    "Policy",
    "StepError",
    "WarmupPolicy",
    "WrapperMemoryReport",
    "auto_wrap",
    "checkpoint_sequential_modules",
    "enable_gradient_checkpointing",
    "make_low_memory_policy",
    "plot_memory",
    "wrap",
    "wrap_low_memory_adamw",
    "wrap_max_compression_adamw",
    "wrapped_class",
]
