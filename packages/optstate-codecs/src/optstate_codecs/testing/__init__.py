"""The laws of the family as checks that the tests of any package can call.

Each check takes a ``Subject`` and raises ``AssertionError`` if the subject breaks the law:

    @pytest.mark.parametrize("law", laws_for(subject), ids=lambda law: law.__name__)
    def test_law(law):
        law(subject)
"""

from collections.abc import Callable

from optstate_codecs.testing.defaults import DEFAULTS, independence, tensors_in, torch_defaults
from optstate_codecs.testing.fidelity import GRADIENTS, Fidelity, Stops, compare, gradients, stops
from optstate_codecs.testing.learning import loss_apart
from optstate_codecs.testing.numerics import (
    exactness,
    locality,
    positive_stays_positive,
    same_bits,
    scale_equivariance,
    unbiased_length,
    zero_stays,
)
from optstate_codecs.testing.persistence import resume
from optstate_codecs.testing.storage import bytes_are_said, no_surprises
from optstate_codecs.testing.subject import SHAPES, Subject, Trainer, assert_close

__all__ = [
    "DEFAULTS",
    "GRADIENTS",
    "LAWS",
    "SHAPES",
    "Fidelity",
    "Stops",
    "Subject",
    "Trainer",
    "assert_close",
    "bytes_are_said",
    "compare",
    "exactness",
    "gradients",
    "independence",
    "laws_for",
    "locality",
    "loss_apart",
    "no_surprises",
    "positive_stays_positive",
    "resume",
    "same_bits",
    "scale_equivariance",
    "stops",
    "tensors_in",
    "torch_defaults",
    "unbiased_length",
    "zero_stays",
]

Law = Callable[[Subject], None]

#: the laws for any optimizer; ``exactness`` is added where formats are exact, and ``same_bits``
#: where there is a reference
LAWS: tuple[Law, ...] = (
    zero_stays,
    positive_stays_positive,
    unbiased_length,
    scale_equivariance,
    locality,
    resume,
    bytes_are_said,
    no_surprises,
    independence,
)


def laws_for(subject: Subject) -> tuple[Law, ...]:
    """The laws that apply to ``subject``."""
    first: tuple[Law, ...] = (exactness,) if subject.exact is not None else ()
    return (*first, *LAWS, *((same_bits,) if subject.reference is not None else ()))
