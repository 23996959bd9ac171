"""The arguments that optimizers are also checked with, and the bounds they state.

A public optimizer that is named nowhere here is checked with its defaults, and held to the bounds
of 8 bits, which are ``Subject``'s.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from optstate_codecs import rules
from optstate_wrap import ConfigurablePolicy, WarmupPolicy

__all__ = ["BOUNDS", "GENERIC", "RECIPES", "VARIANTS"]

#: for every class of the family that takes these arguments
GENERIC: dict[str, dict[str, Any]] = {
    "master24": {"master_weight_bits": 24},
    "stochastic": {"bf16_stochastic_round": True},
}
MASTER32 = {"master32": {"master_weight_bits": 32}}
AMSGRAD = {"amsgrad": {"amsgrad": True}}
CODED = {"min_m_compress_elements": 0, "min_v_compress_elements": 0}
LARGE = {"min_m_compress_elements": 10**9, "min_v_compress_elements": 10**9}
CONSERVATIVE = {**CODED, "mode": "adamw"}
FLUSHED = {**CONSERVATIVE, "error_feedback": True}
EIGHT_BITS = {"exp_avg": "int8(rounding=stochastic, units=update)", "exp_avg_sq": "oneq(bits=8)"}
#: by the name of a public optimizer
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lowbit_adam.Adam8bit": AMSGRAD,
    "lowbit_adam.AdamW8bit": {
        **MASTER32,
        "256": {"block_size": 256},
        "formats": {"formats": {"exp_avg": "bf16(rounding=stochastic)"}},
        "centred": {"centralization": 1.0},
    },
    "lowbit_adam.AdamW4bit": {
        "64": {"block_size": 64},
        "rank1": {"formats": {"exp_avg_sq": "linear4(normalization=rank1)"}},
        "flushed": {"error_feedback": True},
    },
    "lowbit_adam.SGD8bit": {"momentum": {"momentum": 0.9, "nesterov": True}},
    "stochbf16.AdamW": {**MASTER32, **AMSGRAD, "centred": {"centralization": 1.0}},
    "stochbf16.SGD": {"momentum": {"momentum": 0.9}},
    "turboadam.TurboAdam": {
        **MASTER32,
        **AMSGRAD,
        "switched-off": {"compress_m": False, "compress_v": False},
        "all-small": LARGE,
        "adamw": {"mode": "adamw"},
        "all-coded": CONSERVATIVE,
        "first-only": {**CONSERVATIVE, "compress_v": False},
        "second-only": {**CONSERVATIVE, "compress_m": False},
        "3-and-4": {**CONSERVATIVE, "m_bits": 3, "v_bits": 4},
        "6-and-8": {**CONSERVATIVE, "m_bits": 6, "v_bits": 8},
        "flushed": FLUSHED,
        "flushed-2-and-3": CODED,
        "flushed-even": {**FLUSHED, "m_bits": 2, "m_rounding": "stochastic"},
        "flushed-1-and-3": {**FLUSHED, "m_bits": 1},
        "flushed-1-and-2": {**FLUSHED, "m_bits": 1, "v_bits": 2},
    },
    "optstate_wrap.OptimizerWrapper": {
        "exact": {"policy": ConfigurablePolicy({})},
        "8-bits": {"policy": ConfigurablePolicy(EIGHT_BITS)},
        "8-bits-chunked": {"policy": ConfigurablePolicy(EIGHT_BITS), "fused": False},
        "host": {"policy": WarmupPolicy(1), "store": "host", "chunk_size": 1024},
    },
    "optstate_wrap.OffloadOptimizer": {"8-bits": {"state": EIGHT_BITS}},
}

FIRST = "dynamic8(block_size=256, rounding=stochastic, units=update)"
SECOND = "dynamic8(block_size=256, signed=False, domain=sqrt, rounding=stochastic)"
FIRST4 = "int4(rounding=paired, units=update)"
MATRIX = "linear4(normalization=rank1)"
#: Adam with two formats: of the first moment and of the second, and other arguments
RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bf16-stochastic": ("bf16", "bf16", {"write": "stochastic"}),
    "bf16-split24": ("fp32", "bf16", {"write": "split24"}),
    "bf16-split32": ("fp32", "fp32", {"write": "split32"}),
    "fp32-decoupled": ("fp32", "fp32", {"rule": rules.Adam(decoupled=True)}),
    "int8-update": ("int8(rounding=stochastic, units=update)", SECOND, {}),
    "dynamic8-update": (FIRST, SECOND, {}),
    "rank1-vector": (FIRST4, MATRIX, {}),
    "rank1": (FIRST4, MATRIX, {}),
    "costate-4-3": ("costate(bits=4)", "oneq(bits=3)", {}),
    "costate-2-3": ("costate(bits=2)", "oneq(bits=3)", {}),
    "costate-normal-2-3": (
        "costate(bits=2, block_size=64, levels=normal)",
        "oneq(bits=3, block_size=64)",
        {"rule": rules.Adam(error_feedback=True)},
    ),
    "costate-1-4": (
        "costate(bits=1)",
        "oneq(bits=4)",
        {"rule": rules.Adam(error_feedback=True)},
    ),
}

FOUR_BITS = {"drift": 5.0, "error": 0.4, "gain": 0.05}
# what docs/concepts/laws.md states
TURBO = {"drift": 8.0, "error": 0.2, "gain": 0.07}
LOW = {"drift": 9.0, "error": 0.5, "gain": 0.07}
# rounding to nearest has no bounds worth stating
NEAREST = {"drift": 15.0, "error": 0.4, "gain": 0.2}
FUSED = partial(torch.optim.AdamW, fused=True)
#: fields of ``Subject`` by patterns of a configuration's name; the first one counts
BOUNDS: dict[str, dict[str, Any]] = {
    # what is compared with has no centralization
    "*+centred": {"near": None},
    "lowbit_adam.AdamW4bit+rank1": {**NEAREST, "rows": 8},
    # what nearest rounding takes from a step has been applied before gradients stop
    "lowbit_adam.AdamW4bit+flushed": {**FOUR_BITS, "drift": 6.0},
    "lowbit_adam.*4bit*": FOUR_BITS,
    "lowbit_adam.*Fp8*": {"drift": 2.0},
    # momentum carries an element on by its sum, up to 100 lr here
    "lowbit_adam.SGD8bit+momentum": {"drift": 8.0},
    "stochbf16.SGD+momentum": {"drift": 2.0, "error": 0.02},
    "lowbit_adam.Lion8*": {"max_step": 1.001},
    "turboadam.TurboAdam+second-only": {**TURBO, "drift": 13.0},
    "turboadam.TurboAdam+3-and-4": {**TURBO, "gain": 0.05},
    "turboadam.TurboAdam+6-and-8": {"drift": 1.0, "error": 0.02, "gain": 0.005},
    "turboadam.TurboAdam+adamw": TURBO,
    "turboadam.TurboAdam+all-coded": TURBO,
    "turboadam.TurboAdam+first-only": TURBO,
    "turboadam.TurboAdam+flushed": TURBO,
    "turboadam.TurboAdam*": LOW,
    # a first step of lr / (1 - b1); see the rule
    "stochbf16.Compass*": {"max_step": 101.0},
    # the longest step by Cauchy and Schwarz over 200 steps, 14, without a mean
    "stochbf16.RMSProp*": {"max_step": 15.0},
    "stochbf16.Lion*": {"max_step": 1.001},
    "stochbf16.*": {"error": 0.02},
    "optstate_codecs.CodedOptimizer+Compass*": {"max_step": 101.0},
    "optstate_codecs.CodedOptimizer+RMSProp*": {"max_step": 15.0},
    "optstate_codecs.CodedOptimizer+Lion*": {"max_step": 1.001},
    "optstate_codecs.CodedOptimizer+Adam+fp32": {},
    "optstate_codecs.CodedOptimizer+Adam+bf16*": {},
    "optstate_codecs.CodedOptimizer+Adam+*-update": {},
    "optstate_codecs.CodedOptimizer+Adam+rank1": {**NEAREST, "rows": 8},
    # the second moment is coarse in all three; the gain is off where the first has two bits or one
    "optstate_codecs.CodedOptimizer+Adam+costate-4-3": {
        "drift": 7.0,
        "error": 0.1,
        "gain": 0.06,
        "max_step": 2.0,
    },
    "optstate_codecs.CodedOptimizer+Adam+costate-2-3": {
        "drift": 8.0,
        "error": 0.3,
        "gain": 0.4,
        "max_step": 2.0,
    },
    "optstate_codecs.CodedOptimizer+Adam+costate-normal-2-3": {
        "drift": 9.0,
        "error": 0.5,
        "max_step": 7.0,
    },
    "optstate_codecs.CodedOptimizer+Adam+costate-1-4": {
        "drift": 9.0,
        "error": 0.4,
        "gain": 0.65,
        "max_step": 7.0,
    },
    "optstate_codecs.CodedOptimizer+SGD+fp32*": {"drift": 1e-2, "error": 1e-5},
    "optstate_codecs.CodedOptimizer+*": NEAREST,
    "optstate_wrap.CPUOffloadOptimizer": {"exact": FUSED, "variants": ({}, {"amsgrad": True})},
    "optstate_wrap.OptimizerWrapper+exact": {"exact": torch.optim.AdamW},
    "optstate_wrap.OffloadOptimizer": {"exact": torch.optim.AdamW},
    "optstate_wrap.wrap_max_compression_adamw": FOUR_BITS,
}
