"""Makes the encoded tensors of records from a packed state dict, with every entry checked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.formats import as_format
from optstate_codecs.sharding import is_distributed, local_of
from optstate_codecs.state.components import check_dense, check_scales
from optstate_wrap.state.record import CODED_DTYPES, Coded, Record
from optstate_wrap.state.shards import flat_part

__all__ = ["check_together", "coded_tensor", "copy_to"]

# of decoded tensors, by name
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODED_DTYPES}


def coded_tensor(where: str, saved: Mapping[str, Any], param: Tensor, per_rank: bool) -> Coded:
    """An encoded tensor of a packed state, checked.

    Args:
        where: its place in the state dict, for messages.
        saved: as ``checkpoint`` writes it.
        param: the parameter, on whose device it will be.
        per_rank: whether it is of this worker's shard, not of the whole parameter.

    Raises:
        KeyError, TypeError, ValueError: an entry is missing or wrong.
    """
    missing = {"format", "parts", "dtype", "shape", "order", "root"} - saved.keys()
    if missing:
        raise KeyError(f"{where}: missing key {min(missing)!r}")
    shape, order = tuple(saved["shape"]), tuple(saved["order"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{where}['shape']={saved['shape']!r:.80}: must be sizes of at least 0")
    if sorted(order) != list(range(len(shape))):
        raise ValueError(f"{where}['order']={saved['order']!r:.80}: must have each dimension once")
    if saved["dtype"] not in DTYPES:
        raise ValueError(
            f"{where}['dtype']={saved['dtype']!r:.80}: must be one of {', '.join(DTYPES)}"
        )
    if not isinstance(saved["root"], str):
        raise TypeError(f"{where}['root']={saved['root']!r:.80}: must be text")
    if not isinstance(saved["parts"], (list, tuple)):
        raise TypeError(f"{where}['parts']={saved['parts']!r:.80}: must be a list of tensors")
    format = as_format(saved["format"])
    numel = torch.Size(shape).numel()
    format_here = format.for_shape(shape, order)
    components = format_here.components
    if len(saved["parts"]) != len(components):
        raise ValueError(f"{where}: {len(saved['parts'])} components, must be {len(components)}")
    parts = []
    for part, component in zip(saved["parts"], components, strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(f"{where}['parts']: {part!r:.80}, must be tensors")
        check_dense(f"{where}['parts']", local_of(part))
        if part.is_meta and not param.is_meta:
            raise ValueError(f"{where}['parts']: is on meta, without values")
        if part.dtype != component.dtype or part.numel() != component.length(numel):
            raise ValueError(
                f"{where}: a component of shape {tuple(part.shape)} and dtype {part.dtype}, must "
                f"be {(component.length(numel),)} and {component.dtype}"
            )
        if per_rank or not is_distributed(param):
            part = copy_to(param, flat_part(part, component, shape, order))
        check_scales(where, local_of(part), component, format_here)
        parts.append(part)
    return Coded(format, tuple(parts), DTYPES[saved["dtype"]], shape, order, saved["root"])


def check_together(where: str, record: Record) -> None:
    """Raise unless the coded values of a record can be decoded together."""
    coded = {key: value for key, value in record.items() if isinstance(value, Coded)}
    if len({(value.shape, value.order) for value in coded.values()}) > 1:
        raise ValueError(f"{where}: {', '.join(coded)} differ in shape or order")
    for key, value in coded.items():
        if (value.root != "") != value.format.in_update_units or value.root == key:
            raise ValueError(
                f"{where}[{key!r}]['root']={value.root!r:.80}: must be the key of a second moment "
                "with units='update', and empty otherwise"
            )
        if value.root and (value.root not in coded or coded[value.root].root):
            raise ValueError(f"{where}[{key!r}]['root']={value.root!r:.80}: is no coded moment")


def copy_to(param: Tensor, value: Any) -> Any:
    """A copy of a value, with tensors that have dimensions on the device of ``param``."""
    if type(value) in (list, tuple):
        # torch.optim.LBFGS keeps its history in lists
        return type(value)(copy_to(param, item) for item in value)
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    device = param.device if value.dim() else value.device
    return value.detach().to(device, copy=True)
