"""Optimizers of this package, of every rule, format and write."""

from functools import partial

import torch

from optstate_codecs import Adam, CodedOptimizer
from optstate_codecs.testing import Subject

EXACT = {"exp_avg": "fp32", "exp_avg_sq": "fp32", "max_exp_avg_sq": "fp32"}


def adam(
    first: str,
    second: str,
    *,
    decoupled: bool = False,
    error_feedback: bool = False,
    **options: object,
) -> partial:
    formats = {"exp_avg": first, "exp_avg_sq": second, "max_exp_avg_sq": second}
    rule = Adam(decoupled, error_feedback)
    return partial(CodedOptimizer, rule=rule, formats=formats, **options)


FIRST = "dynamic8(block_size=256, rounding=stochastic, units=update)"
SECOND = "dynamic8(block_size=256, signed=False, domain=sqrt, rounding=stochastic)"
FIRST4 = "int4(rounding=paired, units=update)"
RANK1 = "linear4(normalization=rank1)"
NEAREST = {"drift": 15.0, "error": 0.4, "gain": 0.2}
# the second moment is coarse in all three; the gain is off where the first has two bits or one
FOUR_THREE = {"drift": 7.0, "error": 0.1, "gain": 0.06, "max_step": 2.0}
TWO_THREE = {"drift": 8.0, "error": 0.3, "gain": 0.4, "max_step": 2.0}
ONE_FOUR = {"drift": 9.0, "error": 0.4, "gain": 0.65, "max_step": 7.0}
# what error feedback delivers at once is a part of the step
FLUSH = ONE_FOUR

SGD_VARIANTS = (
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3},
)

SUBJECTS = [
    Subject("adam-fp32", adam("fp32", "fp32"), exact=torch.optim.Adam),
    Subject("adamw-fp32", adam("fp32", "fp32", decoupled=True), exact=torch.optim.AdamW),
    Subject("adam-bf16", adam("bf16", "bf16", write="stochastic")),
    Subject("adam-int8", adam("int8", "fp32")),
    Subject("adam-int8-update", adam("int8(rounding=stochastic, units=update)", SECOND)),
    Subject(
        "adamw-dynamic8",
        adam("dynamic8(rounding=stochastic, units=update)", SECOND, decoupled=True),
    ),
    Subject("adam-compiled", adam(FIRST, SECOND, backend="compile")),
    # rounding to nearest has no band for the length worth stating; this is what it keeps here
    Subject("adam-rank1", adam(FIRST4, RANK1), **NEAREST),
    Subject("adam-rank1-matrix", adam(FIRST4, RANK1), rows=8, **NEAREST),
    Subject("adam-costate-4-3", adam("costate(bits=4)", "oneq(bits=3)"), **FOUR_THREE),
    Subject("adam-costate-2-3", adam("costate(bits=2)", "oneq(bits=3)"), **TWO_THREE),
    Subject(
        "adam-costate-1-4",
        adam("costate(bits=1)", "oneq(bits=4)", error_feedback=True),
        **ONE_FOUR,
    ),
    Subject(
        "adam-flush-2-3",
        adam(
            "costate(bits=2, block_size=64, levels=normal)",
            "oneq(bits=3, block_size=64)",
            error_feedback=True,
        ),
        **FLUSH,
    ),
    Subject("adam-split24", adam("fp32", "bf16", write="split24")),
    Subject("adam-split32", adam("fp32", "fp32", write="split32"), exact=torch.optim.Adam),
]
