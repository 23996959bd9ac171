"""State dicts as JSON values and named tensors, and back; see ``state_file``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optstate_codecs.plain import plain_value

__all__ = ["JsonReader", "JsonWriter", "is_pair"]


def is_pair(pair: Any) -> bool:
    """Whether a JSON value is a list of a key and something else."""
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (str, int))


class JsonWriter:
    """Turns a state dict into JSON values, and collects its tensors.

    Args:
        groups: of the state dict.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.tensors: dict[str, Tensor] = {}
        numbers = [number for group in groups for number in group["params"]]
        names = [name for group in groups for name in group.get("param_names") or ()]
        unique = len(set(names)) == len(numbers) == len(names)
        self._labels = dict(zip(numbers, names if unique else map(str, numbers), strict=True))
        self._memory: set[int] = set()

    def label(self, key: Any) -> str:
        """The part of a tensor's name that stands for a key of ``state``."""
        return str(self._labels.get(key, key))

    def encoded(self, name: str, value: Any) -> Any:
        """``value`` as JSON; what JSON lacks is a table with one key that says its type.

        Raises:
            TypeError: it holds something else than tensors and plain values.
        """
        value = plain_value(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            return {"tensor": self._added(name, value)}
        if isinstance(value, (list, tuple)):
            items = [self.encoded(f"{name}.{n}", item) for n, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, Mapping):
            pairs = [[key, self.encoded(f"{name}.{key}", v)] for key, v in value.items()]
            if wrong := [key for key, _ in pairs if not isinstance(key, (str, int))]:
                raise TypeError(f"{name}: key {wrong[0]!r}: must be text or an int to be saved")
            return {"dict": pairs}
        raise TypeError(f"{name}: {type(value).__name__}: must be a tensor or a plain value")

    def _added(self, name: str, value: Tensor) -> str:
        while name in self.tensors:
            name += "_"
        tensor = value.detach().cpu().contiguous()
        if tensor.data_ptr() in self._memory:
            # two entries of one memory, which safetensors refuses
            tensor = tensor.clone()
        if tensor.numel():
            self._memory.add(tensor.data_ptr())
        self.tensors[name] = tensor
        return name


class JsonReader:
    """The inverse of ``JsonWriter``.

    Args:
        where: names the file in messages.
        file: from ``safe_open``.
    """

    def __init__(self, where: str, file: Any) -> None:
        self._where, self._file = where, file
        self._names = set(file.keys())
        self._read: set[str] = set()

    def decoded(self, name: str, value: Any) -> Any:
        """The value that JSON stands for.

        Raises:
            ValueError, KeyError: it was not written by ``JsonWriter``, or a tensor is missing.
        """
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [self.decoded(f"{name}[{n}]", item) for n, item in enumerate(value)]
        content = next(iter(value.values())) if len(value) == 1 else None
        if "tensor" in value and isinstance(content, str):
            return self._tensor(name, content)
        if "tuple" in value and isinstance(content, list):
            return tuple(self.decoded(name, content))
        if "dict" in value and isinstance(content, list) and all(map(is_pair, content)):
            if len({key for key, _ in content}) < len(content):
                raise ValueError(f"{self._where}: header: {name}: a key is there twice")
            return {key: self.decoded(f"{name}[{key!r}]", item) for key, item in content}
        raise ValueError(f"{self._where}: header: {name}={value!r:.80}: not a value")

    def _tensor(self, name: str, key: str) -> Tensor:
        if key not in self._names:
            raise KeyError(f"{self._where}: {name}: missing tensor {key!r}")
        if key in self._read:
            raise ValueError(f"{self._where}: {name}: tensor {key!r} is used twice")
        self._read.add(key)
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def check_all_read(self) -> None:
        """Raise if the file has tensors that the header does not name."""
        if extra := sorted(self._names - self._read):
            raise KeyError(f"{self._where}: unknown tensor {extra[0]!r}")
