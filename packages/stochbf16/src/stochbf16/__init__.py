"""Pure bfloat16 training: optimizers and gradient accumulation with stochastic rounding."""

from stochbf16.accumulator import StochasticAccumulator
from stochbf16.optimizers import SGD, Adam, AdamW, Compass, Lion, LPFAdamW, RMSProp
from stochbf16.rounding import stochastic_round, stochastic_round_

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Compass",
    "LPFAdamW",
    "Lion",
    "RMSProp",
    "StochasticAccumulator",
    "stochastic_round",
    "stochastic_round_",
]
