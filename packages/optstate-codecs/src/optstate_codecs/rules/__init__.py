"""Update rules: the mathematics of each optimizer, one file each, in torch."""

from optstate_codecs.rules.adam import Adam, AdamHyper
from optstate_codecs.rules.base import Moment, Rule

__all__ = ["Adam", "AdamHyper", "Moment", "Rule"]
