"""Update rules: the mathematics of each optimizer in torch and in Triton, one file per rule."""

from optstate_codecs.rules.adam import Adam, AdamHyper
from optstate_codecs.rules.base import Moment, Rule
from optstate_codecs.rules.compass import Compass, CompassHyper
from optstate_codecs.rules.lion import Lion, LionHyper
from optstate_codecs.rules.lpf import LPFAdamW, LPFAdamWHyper
from optstate_codecs.rules.rmsprop import RMSProp, RMSPropHyper
from optstate_codecs.rules.sgd import SGD, SGDHyper

__all__ = [
    "SGD",
    "Adam",
    "AdamHyper",
    "Compass",
    "CompassHyper",
    "LPFAdamW",
    "LPFAdamWHyper",
    "Lion",
    "LionHyper",
    "Moment",
    "RMSProp",
    "RMSPropHyper",
    "Rule",
    "SGDHyper",
]
