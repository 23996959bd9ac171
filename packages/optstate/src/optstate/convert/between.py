"""Converts a state dict to another library's layout."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate.checkpoints import Checkpoint, library_of, moment_shape
from optstate.convert.packed import Shapes, StateDict, decoded, known_shapes, param_groups
from optstate.siblings import require
from optstate_codecs import CodedOptimizer
from optstate_codecs.convert import adam_state_dict

READERS = {
    "torchao": ("lowbit_adam.convert", "from_torchao"),
    "bitsandbytes": ("lowbit_adam.convert", "from_bitsandbytes"),
    "turboadam-0.2": ("turboadam.convert", "from_turboadam"),
}
"""By library: the module and function that decode its state to ``torch.optim``'s layout."""
WRAPPED = (
    "a packed state dict of optstate_wrap is decoded by its wrapper alone: load it there, set"
    " packed_checkpoints=False, and save state_dict()"
)
NO_CLASS = "torch.optim has no {}, whose state this is; name a class of the family with --to"


def from_torchastic(state_dict: Mapping[str, Any]) -> StateDict:
    """The state of torchastic's ``Adam`` or ``AdamW`` in the layout of ``torch.optim.AdamW``.

    Raises:
        ValueError: it is another optimizer's, which ``torch.optim`` does not have.
    """
    if any("amp_fac" in group for group in state_dict["param_groups"]):
        raise ValueError(NO_CLASS.format("Compass or LPFAdamW"))

    def decode(number: Any, state: Mapping[str, Any], group: object) -> dict[str, Tensor]:
        for name in ("ema", "ema_squared"):
            if name not in state:
                raise KeyError(f"state_dict['state'][{number!r}]: missing key {name!r}")
        return {"exp_avg": state["ema"].float(), "exp_avg_sq": state["ema_squared"].float()}

    return adam_state_dict(state_dict, decode)


def to_torch(library: str, checkpoint: Checkpoint, shapes: Shapes) -> StateDict:
    """A state dict in the layout of ``torch.optim``, with moments in float32.

    Args:
        library: that wrote it.
        checkpoint: with the state dict.
        shapes: of parameters, for packed state whose codes do not tell them.

    Raises:
        KeyError, TypeError, ValueError: the state cannot be converted; the message says why.
        MissingExtra: the package that decodes it is not installed.
    """
    state_dict = checkpoint.state_dict
    if library == "torch":
        return state_dict
    if library == "torchastic":
        return from_torchastic(state_dict)
    if library == "optstate":
        full, rule = decoded(state_dict, known_shapes(state_dict, checkpoint.shapes | shapes))
        if not rule.in_torch:
            raise ValueError(NO_CLASS.format(type(rule).__name__))
        return full
    if library not in READERS:
        raise ValueError(WRAPPED)
    module, function = READERS[library]
    converted: StateDict = getattr(require(module), function)(state_dict)
    return converted


def to_family(
    library: str, checkpoint: Checkpoint, make: Callable[..., Optimizer], shapes: Shapes
) -> CodedOptimizer:
    """An optimizer of the family with the state of a checkpoint, and parameters without values.

    Args:
        library: that wrote the checkpoint.
        checkpoint: with the state dict.
        make: called with param groups; makes an optimizer of the family.
        shapes: of parameters, for packed state whose codes do not tell them.

    Raises:
        KeyError, TypeError, ValueError: the state does not fit the optimizer; the message says why.
        MissingExtra: the package that decodes it is not installed.
    """
    state_dict = checkpoint.state_dict
    if library == "optstate":
        known = known_shapes(state_dict, checkpoint.shapes | shapes)
    else:
        if library != "torchastic" or not _takes(make, state_dict):
            state_dict = to_torch(library, checkpoint, shapes)
        known = {
            number: shape
            for number, entry in state_dict["state"].items()
            if isinstance(entry, Mapping) and (shape := moment_shape(entry)) is not None
        }
    optimizer = make(list(param_groups(state_dict, known)))
    if not isinstance(optimizer, CodedOptimizer):
        raise ValueError(f"{type(optimizer).__name__}: must be torch, or a class of the family")
    optimizer.load_state_dict(state_dict)
    return optimizer


def _takes(make: Callable[..., Optimizer], state_dict: Mapping[str, Any]) -> bool:
    """Whether an optimizer has the moments of a state dict under the same names."""
    optimizer = make(list(param_groups({**state_dict, "state": {}}, {})))
    if not isinstance(optimizer, CodedOptimizer):
        return False
    names = {name for group in optimizer.param_groups for name in optimizer.group_formats(group)}
    entries = [entry for entry in state_dict["state"].values() if entry]
    return all(names <= set(entry) for entry in entries)


def library_named(checkpoint: Checkpoint, given: str | None) -> str:
    """The library that wrote a checkpoint, which must be the one that was given.

    Raises:
        ValueError: it is another.
    """
    found = library_of(checkpoint.state_dict)
    if given is not None and given != found:
        raise ValueError(f"{given!r}: {checkpoint.path} has a state dict of {found}")
    return found
