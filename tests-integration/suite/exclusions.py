"""What the suite does not check, and why: the table that is printed at the end of a run.

The first entry that matches a case counts. An entry that matches none is an error.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from optstate_codecs.formats import format_names

__all__ = ["EXCLUSIONS", "Exclusion"]


@dataclass(frozen=True)
class Exclusion:
    """Cases that do not apply.

    Attributes:
        laws: names of laws, as a pattern; several separated by "|".
        condition: the cases, in words.
        holds: the same as code.
        reason: why.
        shown: the laws as the table shows them, where not by the pattern.
    """

    laws: str
    condition: str
    holds: Callable[[Any], bool]
    reason: str
    shown: str = ""

    def matches(self, case: Any) -> bool:
        """Whether ``case`` is among them."""
        name = case.law.__name__
        return any(fnmatchcase(name, law) for law in self.laws.split("|")) and self.holds(case)


def _only(laws: str, condition: str, holds: Callable[[Any], bool], reason: str) -> Exclusion:
    """Every law but these."""
    names = laws.split("|")
    return Exclusion(
        "*",
        condition,
        lambda c: holds(c) and c.law.__name__ not in names,
        reason,
        f"all but {laws}",
    )


def _named(*patterns: str) -> Callable[[Any], bool]:
    return lambda case: any(fnmatchcase(case.configuration.name, p) for p in patterns)


def _point(**values: Any) -> Callable[[Any], bool]:
    return lambda case: all(
        getattr(case.point, key) in (value if isinstance(value, tuple) else (value,))
        for key, value in values.items()
    )


def _first(case: Any) -> bool:
    """Whether it is at the point that everything is checked at."""
    writes = any(fnmatchcase(case.configuration.name, f"*{end}") for end in WRITES)
    dtype = "bfloat16" if writes else "float32"
    return _point(dtype=dtype, backend="eager", store="device", layout="plain", device="cpu")(case)


def _sampled_out(case: Any) -> bool:
    """Three of four points, for configurations with other arguments."""
    name = f"{case.configuration.name} {case.point.name}"
    return not _first(case) and zlib.crc32(name.encode()) % 4 != 0


ROUNDING = [name for name in format_names() if name not in ("fp32", "bf16", "fp16")]
WRITES = ("+master??", "+stochastic", "+Adam+bf16-s*")
EXCLUSIONS = (
    Exclusion(
        "*",
        "another name of a class; any point but the first",
        lambda case: case.configuration.public.base is not None and not _first(case),
        "it adds nothing to the class, which is checked at every point",
    ),
    Exclusion(
        "*",
        "wrapped optimizer; backend compile or triton",
        lambda case: not case.configuration.coded and case.point.backend != "eager",
        "there is no argument: torch's step or the engine's own choice of a backend takes the step",
    ),
    Exclusion(
        "*",
        "wrapped optimizer; store host or disk",
        lambda case: not case.configuration.coded and case.point.store != "device",
        "the store is an argument: the configurations +host and OffloadOptimizer",
    ),
    Exclusion(
        "*",
        "offload, offloaded_class; store host or disk",
        lambda case: _named("optstate_codecs.offload*")(case) and case.point.store != "device",
        "they are the store",
    ),
    Exclusion(
        "*",
        "a write for 16 bits; parameters of 32 and 64",
        lambda case: (
            _named(*(f"*{end}" for end in WRITES))(case)
            and case.point.dtype not in ("bfloat16", "float16")
        ),
        "such parameters are rounded to nearest, as without the argument",
    ),
    Exclusion(
        "*",
        "arguments other than the defaults; any point but the first",
        lambda case: case.configuration.variant not in ("", "Adam+fp32") and _sampled_out(case),
        "one point in four, chosen by a checksum of the names, which stays the same",
    ),
    _only(
        "same_bits|resume|bytes_are_said|no_surprises|locality|exactness",
        "store host or disk",
        _point(store=("host", "disk")),
        "same_bits ties offloaded steps to resident ones, which keep the law",
    ),
    _only(
        "same_bits",
        "Triton's interpreter",
        _point(backend="triton", device="cpu"),
        "minutes for each; same_bits ties the kernel to the reference, which keeps the law",
    ),
    _only(
        "same_bits|resume|unbiased_length",
        "CUDA",
        _point(device="cuda"),
        "same_bits ties the kernel to the reference, which keeps the law on a CPU",
    ),
    Exclusion(
        "exactness",
        "formats other than fp32, or a rule that torch.optim has no class of",
        lambda case: case.configuration.fields.get("exact") is None,
        "state is rounded, or there is nothing to be equal to",
    ),
    Exclusion(
        "exactness",
        "parameters of 16 and of 64 bits",
        lambda case: case.configuration.coded and case.point.dtype != "float32",
        "moments and arithmetic are float32, torch's have the dtype of the parameter",
    ),
    Exclusion(
        "same_bits",
        "the reference on plain tensors, state on the device",
        lambda case: _point(backend="eager", store="device", device="cpu", layout="plain")(case),
        "it is the reference",
    ),
    Exclusion(
        "same_bits",
        "DTensor",
        _point(layout="dtensor"),
        "blocks end where rows do, so codes are others; test_sharding.py compares 1, 2, 4 workers",
    ),
    Exclusion(
        "unbiased_length",
        "any point but the first on a CPU, and float32 by the kernel on a GPU",
        lambda case: not _first(case) and case.point.name != "float32-triton-device-plain-cuda",
        "1,500 steps; same_bits ties the codes to these",
    ),
    Exclusion(
        "unbiased_length",
        "rules other than Adam",
        lambda case: case.configuration.rule != "Adam",
        "the length is that of Adam's update",
    ),
    Exclusion(
        "unbiased_length",
        "CodedOptimizer with a format of 8 bits or less by its name alone",
        _named(*(f"optstate_codecs.CodedOptimizer+Adam+{name}" for name in ROUNDING)),
        "such formats round to the nearest, which keeps no length",
    ),
    Exclusion(
        "unbiased_length",
        "amsgrad",
        _named("*+amsgrad"),
        "the law steps without it",
    ),
    Exclusion(
        "unbiased_length",
        "Adam with error feedback, but for costate-1-4, whose gain the docs state",
        lambda case: case.configuration.error_feedback and not _named("*+costate-1-4")(case),
        "a step includes most of a first moment; test_feedback.py measures their sum",
    ),
    Exclusion(
        "zero_stays",
        "any point but the first, and float32 and bfloat16 by compiled loops",
        lambda case: (
            not _first(case)
            and not _point(dtype=("float32", "bfloat16"), backend="compile", layout="plain")(case)
        ),
        "1,050 steps; same_bits ties other points to these",
    ),
    Exclusion(
        "scale_equivariance",
        "float16",
        _point(dtype="float16"),
        "its gradients have no factor of 2**40",
    ),
    Exclusion(
        "scale_equivariance|positive_stays_positive",
        "SGD",
        lambda case: case.configuration.rule == "SGD",
        "steps are as long as gradients are, and there is no second moment",
    ),
    Exclusion(
        "locality",
        "dynamic4",
        _named("*+dynamic4"),
        "it is kept as published, for comparison: in a block with a NaN its highest value is lost",
    ),
    Exclusion(
        "*",
        "linear4 with scales per row and column; DTensor",
        lambda case: _named("*+rank1*")(case) and case.point.layout == "dtensor",
        "such scales need the whole tensor, so the format refuses shards",
    ),
    Exclusion(
        "no_surprises|positive_stays_positive",
        "wrapped optimizer; float16",
        lambda case: not case.configuration.coded and case.point.dtype == "float16",
        "torch steps in float16, where its eps is 0 and squares of gradients overflow",
    ),
    Exclusion(
        "locality",
        "TurboAdam with 2 bits for the second moment",
        _named("turboadam.TurboAdam+flushed-1-and-2"),
        "a grid of 2 bits has no octave to spare for NaN",
    ),
    Exclusion(
        "independence",
        "wrapped optimizer",
        lambda case: not case.configuration.coded,
        "torch's optimizer makes state in torch's defaults; optstate-wrap's test_defaults.py",
    ),
    Exclusion(
        "bytes_are_said",
        "wrapped optimizer",
        lambda case: not case.configuration.coded,
        "what is coded depends on the policy and the step, so no number is said beforehand",
    ),
)
