"""The family's laws for TurboAdam."""

from functools import partial

import pytest
import torch

from optstate_codecs.testing import Subject, laws_for
from turboadam import TurboAdam

coded = partial(TurboAdam, min_m_compress_elements=0, min_v_compress_elements=0)
SUBJECTS = [
    Subject(
        "exact",
        partial(TurboAdam, compress_m=False, compress_v=False, backend="eager"),
        exact=torch.optim.AdamW,
    ),
    Subject("default", TurboAdam, drift=50.0, error=0.6, gain=0.05),
    Subject("all-coded", coded, drift=50.0, error=0.6, gain=0.05),
    Subject("m-only", partial(coded, compress_v=False), drift=50.0, error=0.6, gain=0.05),
    Subject("v-only", partial(coded, compress_m=False), drift=50.0, error=0.6, gain=0.05),
    Subject("m6-v8", partial(coded, m_bits=6, v_bits=8), drift=50.0, error=0.6, gain=0.05),
    Subject("m4-v6", partial(coded, m_bits=4, v_bits=6), drift=50.0, error=0.6, gain=0.05),
    Subject("m2-v3", partial(coded, m_bits=2, v_bits=3), drift=50.0, error=0.6, gain=0.05),
    Subject("m1-v2", partial(coded, m_bits=1, v_bits=2), drift=50.0, error=0.6, gain=0.05),
    Subject("m1-v3", partial(coded, m_bits=1, v_bits=3), drift=50.0, error=0.6, gain=0.05),
    Subject("bf16", partial(coded, bf16_stochastic_round=True), drift=50.0, error=0.6, gain=0.05),
    Subject("master", partial(coded, master_weight_bits=24), drift=50.0, error=0.6, gain=0.05),
]
CASES = [
    pytest.param(law, subject, id=f"{subject.name}-{law.__name__}")
    for subject in SUBJECTS
    for law in laws_for(subject)
]


@pytest.mark.parametrize(("law", "subject"), CASES)
def test_law(law, subject) -> None:
    law(subject)
