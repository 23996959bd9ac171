"""The family's laws for TurboAdam."""

from functools import partial

import pytest
import torch

from optstate_codecs.testing import Subject, laws_for, locality, unbiased_length
from turboadam import TurboAdam

coded = partial(TurboAdam, min_m_compress_elements=0, min_v_compress_elements=0)
flushed = partial(coded, error_feedback=True)
large = {"min_m_compress_elements": 10**9, "min_v_compress_elements": 10**9}
# what the docs on laws state
STATED = {"drift": 8.0, "error": 0.2, "gain": 0.07}
LOW = {"drift": 9.0, "error": 0.5, "gain": 0.07}
SUBJECTS = [
    Subject(
        "switched-off",
        partial(TurboAdam, compress_m=False, compress_v=False, backend="eager"),
        exact=torch.optim.AdamW,
    ),
    Subject(
        "all-small",
        partial(TurboAdam, **large, error_feedback=True, backend="eager"),
        exact=torch.optim.AdamW,
    ),
    Subject("default", TurboAdam, **STATED),
    Subject("all-coded", coded, **STATED),
    Subject("first-only", partial(coded, compress_v=False), **STATED),
    Subject("second-only", partial(coded, compress_m=False), **{**STATED, "drift": 13.0}),
    Subject("3-and-4", partial(coded, m_bits=3, v_bits=4), **{**STATED, "gain": 0.05}),
    Subject("6-and-8", partial(coded, m_bits=6, v_bits=8), drift=1.0, error=0.02, gain=0.005),
    Subject("master", partial(coded, master_weight_bits=24), **STATED),
    Subject("flushed", flushed, **STATED),
    Subject("flushed-bf16", partial(flushed, bf16_stochastic_round=True), **STATED),
    Subject("flushed-2-and-3", partial(flushed, m_bits=2, block_size=64), **LOW),
    Subject("even-2-and-3", partial(flushed, m_bits=2, m_rounding="stochastic"), **LOW),
    Subject("flushed-1-and-3", partial(flushed, m_bits=1), **LOW),
    Subject("flushed-1-and-2", partial(flushed, m_bits=1, v_bits=2), **LOW),
]
# Where most of a first moment is delivered at once, one update is no measure of its length: what
# all of them add up to is, in test_feedback.py. And a grid of 2 bits has no octave to
# spare for NaN.
EXCEPT = {
    ("flushed", unbiased_length),
    ("flushed-2-and-3", unbiased_length),
    ("even-2-and-3", unbiased_length),
    ("flushed-1-and-3", unbiased_length),
    ("flushed-1-and-2", unbiased_length),
    ("flushed-1-and-2", locality),
    # as those of the same bits, and slow
    ("default", unbiased_length),
    ("master", unbiased_length),
    ("flushed-bf16", unbiased_length),
}
CASES = [
    pytest.param(law, subject, id=f"{subject.name}-{law.__name__}")
    for subject in SUBJECTS
    for law in laws_for(subject)
    if (subject.name, law) not in EXCEPT
]


@pytest.mark.parametrize(("law", "subject"), CASES)
def test_law(law, subject) -> None:
    law(subject)
