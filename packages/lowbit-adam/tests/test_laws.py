"""The family's laws for every optimizer of this package."""

from functools import partial

import pytest

from lowbit_adam import Adam4bit, Adam8bit, AdamFp8, AdamW4bit, AdamW8bit, AdamWFp8
from optstate_codecs.testing import Subject, laws_for, unbiased_length

# what the docs on laws state
FOUR_BITS = {"drift": 5.0, "error": 0.4, "gain": 0.05}
SUBJECTS = [
    Subject("Adam8bit", Adam8bit),
    Subject("AdamW8bit", AdamW8bit),
    Subject("AdamW8bit-256", partial(AdamW8bit, block_size=256)),
    Subject("AdamW8bit-bf16", partial(AdamW8bit, bf16_stochastic_round=True)),
    Subject("AdamW8bit-master", partial(AdamW8bit, master_weight_bits=24)),
    Subject("Adam8bit-amsgrad", partial(Adam8bit, amsgrad=True)),
    Subject("AdamFp8", AdamFp8, drift=2.0),
    Subject("AdamWFp8", AdamWFp8, drift=2.0),
    Subject("Adam4bit", Adam4bit, **FOUR_BITS),
    Subject("AdamW4bit", AdamW4bit, **FOUR_BITS),
    Subject("AdamW4bit-64", partial(AdamW4bit, block_size=64), **FOUR_BITS),
    Subject("AdamW4bit-flushed", partial(AdamW4bit, error_feedback=True), **FOUR_BITS),
]
CASES = [
    pytest.param(law, subject, id=f"{subject.name}-{law.__name__}")
    for subject in SUBJECTS
    for law in laws_for(subject)
    # an update that includes what later ones would have is longer; test_low_bits.py adds all up
    if not (subject.name == "AdamW4bit-flushed" and law is unbiased_length)
]


@pytest.mark.parametrize(("law", "subject"), CASES)
def test_law(law, subject) -> None:
    law(subject)
