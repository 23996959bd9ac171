"""What does not pass in more than one test: arguments and cases that an optimizer does not have."""

from accounting import Refused

__all__ = ["AMSGRAD_WITH_TENSORS", "NO_SUCH_ARGUMENT", "ONE_GROUP"]

#: arguments of torch's classes that rules without that choice do not have
NO_SUCH_ARGUMENT = {
    ("*Lion*", "*amsgrad*"): Refused("amsgrad: unknown argument"),
    ("*Compass", "*amsgrad*"): Refused("amsgrad: unknown argument"),
    ("*LPFAdamW", "*amsgrad*"): Refused("amsgrad: unknown argument"),
    ("*RMSProp", "*centered*"): Refused("centered: unknown argument"),
    ("*RMSProp", "momentum*"): Refused("(centered|momentum): unknown argument"),
}
#: of the inputs that hold tensors, which have amsgrad in their name or at False
AMSGRAD_WITH_TENSORS = {
    (whose, "Tensor lr, Tensor betas*"): Refused("amsgrad: unknown argument")
    for whose in ("*Lion*", "*Compass", "*LPFAdamW")
}
ONE_GROUP = {("wrap-LBFGS", "*"): "torch's LBFGS takes one group of parameters"}
