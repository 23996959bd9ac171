"""Every optimizer of stochbf16 keeps the laws that apply to its rule."""

from functools import partial

import pytest

from optstate_codecs import testing
from optstate_codecs.testing import Subject, laws_for
from stochbf16 import SGD, Adam, AdamW, Compass, Lion, LPFAdamW, RMSProp

STORED = (testing.locality, testing.resume, testing.bytes_are_said, testing.independence)
SECOND = (testing.positive_stays_positive, testing.scale_equivariance, *STORED)
adam = Subject("adam", Adam, drift=1.0, error=0.02)
SUBJECTS = [
    (adam, laws_for(adam)),
    (Subject("adamw", AdamW, error=0.02), (testing.no_surprises, *SECOND)),
    (Subject("adamw-24", partial(AdamW, master_weight_bits=24)), SECOND),
    (Subject("adamw-centred", partial(AdamW, centralization=1.0)), STORED[1:]),
    # a first step of lr / (1 - b1); see the rule
    (Subject("compass", Compass, max_step=101.0), SECOND),
    (Subject("lpf_adamw", LPFAdamW), SECOND),
    # the longest step by Cauchy and Schwarz over 200 steps, 14, without a mean
    (Subject("rmsprop", RMSProp, max_step=15.0), SECOND),
    (Subject("sgd", partial(SGD, momentum=0.9)), STORED),
    (Subject("sgd-plain", SGD), STORED),
    (Subject("lion", Lion, max_step=1.001), SECOND),
]
CASES = [
    pytest.param(law, subject, id=f"{subject.name}-{law.__name__}")
    for subject, laws in SUBJECTS
    for law in laws
]


@pytest.mark.parametrize(("law", "subject"), CASES)
def test_law(law, subject) -> None:
    law(subject)
