"""A model as a list of parameters without memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor
from torch.nn import Parameter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of parameters by their names on the command line."""


@dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
        shape: its sizes.
        dtype: of its elements.
        trained: whether it has a gradient and optimizer state.
        name: its name, or "" if it has none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool = True
    name: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Model:
    """The parameters of a model, each once.

    Attributes:
        source: where they are from, for the report.
        entries: the parameters.
        notes: what the reader should know about them.
    """

    source: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of_shapes(
        cls,
        source: str,
        shapes: Iterable[Sequence[int]],
        dtype: torch.dtype,
        notes: tuple[str, ...] = (),
    ) -> "Model":
        """A model that trains parameters of these shapes."""
        return cls(source, tuple(Entry(tuple(shape), dtype) for shape in shapes), notes)

    @classmethod
    def of_tensors(
        cls, source: str, tensors: Iterable[tuple[str, Tensor]], notes: tuple[str, ...] = ()
    ) -> "Model":
        """A model with the shapes and dtypes of tensors; those with ``requires_grad`` are trained.

        Tensors that are one in memory are one parameter.
        """
        found: dict[object, Entry] = {}
        for name, tensor in tensors:
            entry = Entry(tuple(tensor.shape), tensor.dtype, tensor.requires_grad, name)
            storage = (tensor.untyped_storage()._cdata, tensor.storage_offset(), entry.shape)
            found.setdefault(storage if tensor.numel() else name, entry)
        return cls(source, tuple(found.values()), notes)

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(prod(entry.shape) for entry in self.entries)

    @property
    def trained_parameters(self) -> int:
        """Elements of the trained parameters."""
        return sum(prod(entry.shape) for entry in self.trained)

    @property
    def trained(self) -> tuple[Entry, ...]:
        """The parameters that an optimizer steps."""
        return tuple(entry for entry in self.entries if entry.trained)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def dtypes(self) -> str:
        """The dtypes of the parameters, each once."""
        names = [str(entry.dtype).removeprefix("torch.") for entry in self.entries]
        return ", ".join(dict.fromkeys(names))

    def in_dtype(self, dtype: torch.dtype) -> "Model":
        """The model with all parameters in another dtype."""
        return replace(self, entries=tuple(replace(one, dtype=dtype) for one in self.entries))

    def meta_params(self) -> list[Parameter]:
        """The trained parameters on the meta device."""
        return [
            Parameter(torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
            for entry in self.trained
        ]
