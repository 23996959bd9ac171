"""What is in a checkpoint: the stored tensors of each parameter, and the groups' values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from optstate.checkpoints import Checkpoint, library_of, moment_shape
from optstate.convert.packed import formats_of, shape_of
from optstate_codecs.memory import storage_bytes

Shape = tuple[int, ...]
BNB_WRAPPED = "__bnb_optimizer_quant_state__"
"""The entry in which newer versions of bitsandbytes keep their state."""


@dataclass(frozen=True)
class Part:
    """A stored tensor.

    Attributes:
        key: in the parameter's state.
        nbytes: of the tensor.
        dtype: or the name of its class; "" if the file does not say.
    """

    key: str
    nbytes: int
    dtype: str = ""


@dataclass(frozen=True)
class ParamState:
    """The state of one parameter.

    Attributes:
        name: or number.
        group: the number of its group, or None if the file does not say.
        parts: its tensors, without the step count.
        shape: of the parameter, or None if the file does not say.
        step: its step count, or None if the file does not say.
    """

    name: str
    group: int | None
    parts: tuple[Part, ...]
    shape: Shape | None = None
    step: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.parts)

    @property
    def numel(self) -> int | None:
        """Elements of the parameter."""
        return None if self.shape is None else prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """All optimizer state in a file.

    Attributes:
        kind: "torch file", "safetensors", "disk store" or "distributed checkpoint".
        library: that wrote it, as `library_of` says.
        params: the state of each parameter.
        groups: the values of each param group.
        optimizer: the name of the class, if the file has it.
    """

    kind: str
    library: str
    params: tuple[ParamState, ...]
    groups: tuple[dict[str, Any], ...] = field(default=())
    optimizer: str = ""

    @property
    def numel(self) -> int | None:
        """Elements of all parameters with state; None if a shape is not known."""
        found = [param.numel for param in self.params]
        return None if None in found else sum(n for n in found if n is not None)

    def format_of(self, param: ParamState, key: str) -> str:
        """The format of the moment that a state key belongs to; "" if the file does not say."""
        group = self.groups[param.group] if self.groups and param.group is not None else {}
        formats = group.get("formats") or {}
        names = [name for name in formats if key == name or key.startswith(f"{name}_")]
        return str(formats[max(names, key=len)]) if names else ""


def of_checkpoint(checkpoint: Checkpoint) -> Contents:
    """The state in a torch file or a safetensors file."""
    state_dict = checkpoint.state_dict
    params = tuple(_params(state_dict, checkpoint.shapes))
    kind = "safetensors" if checkpoint.content is None else "torch file"
    groups = tuple(plain_group(group) for group in state_dict["param_groups"])
    return Contents(kind, library_of(state_dict), params, groups, checkpoint.optimizer)


def _params(state_dict: Mapping[str, Any], shapes: Mapping[Any, Shape]) -> Iterator[ParamState]:
    names: dict[Any, str] = {}
    group_of: dict[Any, int] = {}
    for index, group in enumerate(state_dict["param_groups"]):
        known = group.get("param_names") or group["params"]
        names |= dict(zip(group["params"], map(str, known), strict=True))
        group_of |= dict.fromkeys(group["params"], index)
    for number, entry in state_dict["state"].items():
        if not isinstance(entry, Mapping) or number not in group_of:
            continue
        group = state_dict["param_groups"][group_of[number]]
        if number in shapes:
            shape: Shape | None = shapes[number]
        elif "formats" in group:
            shape = shape_of(entry, formats_of(group))
        else:
            shape = moment_shape({**entry, **entry.get(BNB_WRAPPED, {})})
        parts = tuple(_parts(entry))
        yield ParamState(names[number], group_of[number], parts, shape, _step(entry.get("step")))


def _parts(entry: Mapping[str, Any]) -> Iterator[Part]:
    for key, value in entry.items():
        if key == "step":
            continue
        if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
            # a moment as several tensors
            yield from (
                Part(f"{key}.{part.key}", part.nbytes, part.dtype) for part in _parts(value)
            )
            continue
        nbytes = storage_bytes([value])
        if type(value) is Tensor:
            yield Part(str(key), value.nbytes, dtype_name(value.dtype))
        elif nbytes:
            yield Part(str(key), nbytes, type(value).__name__)


def _step(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None


def dtype_name(dtype: Any) -> str:
    """A dtype without its module."""
    return str(dtype).removeprefix("torch.")


def plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group's values that JSON can express, with the number of its parameters."""
    found = {key: _plain(value) for key, value in group.items() if key != "param_names"}
    params = group["params"]
    return {**found, "params": len(params) if isinstance(params, Sequence) else params}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else list(value.shape)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
