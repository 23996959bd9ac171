"""Optimizers whose state is elsewhere keep the laws of those whose state is beside them."""

import pytest
from subjects import SUBJECTS

from optstate_codecs.offloading import offload
from optstate_codecs.testing import Subject, bytes_are_said, exactness, no_surprises, resume

NAMES = ("adam-split24",)


def _offloaded(name: str, size: int) -> Subject:
    subject = next(s for s in SUBJECTS if s.name == name)

    def make(*args, **options):
        return offload(subject.make(*args, **options), chunk_bytes=size)

    kept = {"near": subject.near, "error": subject.error, "exact": subject.exact}
    return Subject(name, make, **kept, variants=({"amsgrad": True},))


@pytest.mark.parametrize("law", [resume, bytes_are_said, no_surprises], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_laws(name, law):
    law(_offloaded(name, 20_000))


def test_exactness():
    exactness(_offloaded("adamw-fp32", 20_000))
