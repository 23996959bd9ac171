"""Edits of nested values that a fuzzer's bytes decide, as broken and hostile checkpoints hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

Path = tuple[Any, ...]

#: in the place of any value of a JSON text
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 100, 4096, 4097, 2**31, 2**63, -(2**63), 2**64),
    *(10**30, 10**400, 0.5, -0.0, 1e-300, 3e38, 1e300, math.nan, math.inf, -math.inf, ""),
    *("x", "exp_avg", "fp32", "int8", "params", "state", "../x", "/etc/passwd", "\ud800", "\0"),
    *("int8(block_size=-1)", "minifloat(exponent_bits=99)", "costate(bits=3)", [], {}, [0], [[]]),
    *([0, 0], [1, 0], {"x": 1}, {"tensor": "x"}, {"tuple": [1]}, {"dict": [["lr", 1]]}),
)


class Choices:
    """Numbers from a fuzzer's bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def below(self, count: int) -> int:
        """A number from 0 to ``count - 1``."""
        size = 1 if count <= 256 else 2
        taken = self.data[self.at : self.at + size]
        self.at += size
        return int.from_bytes(taken, "little") % count

    def of(self, items: Any) -> Any:
        """One of the items."""
        return items[self.below(len(items))]

    @property
    def rest(self) -> bytes:
        """The bytes that are not used."""
        return self.data[self.at :]


def nodes(value: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of everything in dicts and lists."""
    items: Any = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    for key, inner in items:
        yield (*path, key)
        yield from nodes(inner, (*path, key))


def at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def edited(
    root: Any, choices: Choices, special: Callable[[Choices, Any], Any] | None = None
) -> tuple[Any, set[Path]]:
    """A copy of nested dicts and lists with up to four edits, and their paths.

    Args:
        root: dicts and lists.
        choices: decide the edits.
        special: makes a further kind of value from the present one.
    """
    root = copy.deepcopy(root)
    changed: set[Path] = set()
    for _ in range(1 + choices.below(4)):
        paths = list(nodes(root))
        if not paths:
            break
        path = choices.of(paths)
        parent, key = at(root, path[:-1]), path[-1]
        if isinstance(parent, tuple):
            parent_path = path[:-1]
            parent = list(parent)
            at(root, parent_path[:-1])[parent_path[-1]] = parent
        kind = choices.below(7 if special else 6)
        changed.add(path)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = copy.deepcopy(choices.of(VALUES))
        elif kind == 2:
            other = choices.of(paths)
            parent[key] = copy.deepcopy(_value_at(root, other))
        elif kind == 3:
            if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(parent[key]))
                changed.add(path[:-1])
            else:
                new = choices.of(("x", "exp_avg", "exp_avg_codes", "step", 0, 1, 9, "dim_order"))
                parent[new] = copy.deepcopy(parent[key])
                changed.add((*path[:-1], new))
        elif kind == 4 and isinstance(parent[key], (int, float)):
            parent[key] += choices.of((1, -1, 64, 128, 4096, -4096, 0.5))
        elif kind <= 5:
            parent[key] = copy.deepcopy(choices.of(VALUES))
        else:
            parent[key] = special(choices, parent[key])
    return root, changed


def _value_at(root: Any, path: Path) -> Any:
    try:
        return at(root, path)
    except (KeyError, IndexError, TypeError):
        return None


def tensors(choices: Choices, value: Any) -> Any:
    """A tensor that differs from ``value`` in dtype, shape, layout, kind or values."""
    like = value if isinstance(value, torch.Tensor) and value.is_floating_point() else None
    if not isinstance(value, torch.Tensor):
        value = torch.zeros(choices.of(((), (1,), (3,), (0,), (2, 2))))
    number = choices.of((math.nan, math.inf, -math.inf, -1.0, 0.0, 1e30, 3e38, -3e38, 1e-40))
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: value.to(choices.of(DTYPES)),
        lambda: value.reshape(-1),
        lambda: value[..., :-1] if value.dim() else value.reshape(1, 1),
        lambda: torch.cat([value.reshape(-1)] * 2),
        lambda: (
            torch.full_like(value if like is None else like, number)
            if value.is_floating_point()
            else value.fill_(choices.below(256) - 128 * value.dtype.is_signed)
        ),
        lambda: _one_element(value, choices, number),
        lambda: value.to(torch.float32).to_sparse(),
        lambda: torch.empty(value.shape, dtype=value.dtype, device="meta"),
        lambda: torch.zeros((), dtype=value.dtype).expand(value.shape),
        lambda: torch.zeros((), dtype=value.dtype).expand(2**20, 2**20),
        lambda: value.transpose(0, -1) if value.dim() > 1 else value,
        lambda: torch.quantize_per_tensor(value.to(torch.float32), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([value.to(torch.float32).reshape(-1)]),
        lambda: value.to(torch.float32).requires_grad_(),
        lambda: [value],
        lambda: _random_bytes(value, choices),
    )
    return choices.of(kinds)()


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8),
    *(torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn),
)


def _one_element(value: torch.Tensor, choices: Choices, number: float) -> torch.Tensor:
    value = value.clone().contiguous()
    if value.numel():
        flat = value.view(-1)
        if not value.is_floating_point():
            number = choices.below(2 if value.dtype == torch.bool else 128)
        flat[choices.below(flat.numel())] = number
    return value


def _random_bytes(value: torch.Tensor, choices: Choices) -> torch.Tensor:
    value = value.clone().contiguous()
    if value.numel() and not value.is_complex():
        raw = value.view(-1).view(torch.uint8)
        generator = torch.Generator().manual_seed(choices.below(65536))
        raw.copy_(torch.randint(256, raw.shape, generator=generator, dtype=torch.uint8))
    return value
