"""The family's laws for every optimizer of this package."""

from functools import partial

import pytest

from lowbit_adam import Adam8bit, AdamW8bit
from optstate_codecs.testing import Subject, laws_for

SUBJECTS = [
    Subject("Adam8bit", Adam8bit),
    Subject("AdamW8bit", AdamW8bit),
    Subject("AdamW8bit-256", partial(AdamW8bit, block_size=256)),
    Subject("AdamW8bit-bf16", partial(AdamW8bit, bf16_stochastic_round=True)),
    Subject("AdamW8bit-master", partial(AdamW8bit, master_weight_bits=24)),
    Subject("Adam8bit-amsgrad", partial(Adam8bit, amsgrad=True)),
]
CASES = [
    pytest.param(law, subject, id=f"{subject.name}-{law.__name__}")
    for subject in SUBJECTS
    for law in laws_for(subject)
]


@pytest.mark.parametrize(("law", "subject"), CASES)
def test_law(law, subject) -> None:
    law(subject)
