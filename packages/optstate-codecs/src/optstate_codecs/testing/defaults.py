"""Law 11: torch's default dtype and default device change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.tables import forget_tables
from optstate_codecs.testing.subject import Subject, assert_same
from optstate_codecs.views import master_weights

__all__ = ["DEFAULTS", "independence", "tensors_in", "torch_defaults"]

Shapes = Sequence[Sequence[int]]

#: default dtype and default device (None: unchanged) under which all results must be the same
DEFAULTS: tuple[tuple[torch.dtype, str | None], ...] = (
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float64, None),
    (torch.float32, "meta"),
)


@contextmanager
def torch_defaults(dtype: torch.dtype, device: str | None = None) -> Iterator[None]:
    """Inside, torch has these defaults, as when a training framework builds a model.

    Examples:
        >>> with torch_defaults(torch.bfloat16):
        ...     torch.ones(1).dtype
        torch.bfloat16
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with nullcontext() if device is None else torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def tensors_in(name: str, value: Any) -> dict[str, Tensor]:
    """Every tensor in dicts and lists, by its path; numbers become float64 tensors."""
    if isinstance(value, Tensor):
        return {name: value.detach().clone()}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = dict(enumerate(value)).items()
    elif isinstance(value, (int, float)):
        return {name: torch.tensor(float(value), dtype=torch.float64, device="cpu")}
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= tensors_in(f"{name} {key}", item)
    return found


def _results(subject: Subject, shapes: Shapes) -> dict[str, Any]:
    """The results of steps, of saving, and of loading packed and full state dicts."""
    start = partial(subject.trainer, shapes=shapes)
    first = start(subject.make).run(3)
    packed, full = first.optimizer.state_dict(), first.optimizer.full_state_dict()  # type: ignore[attr-defined]
    found = tensors_in("packed", packed) | tensors_in("full", full)
    second = start(subject.make)
    second.optimizer.load_state_dict(packed)
    found |= tensors_in("loaded packed", second.run(1).tensors())
    # with everything that changes gradients before the rule
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True, "centralization": 0.5}
    third = start(partial(subject.make, **options))
    third.optimizer.load_state_dict(full)
    found |= tensors_in("loaded full", third.run(1).tensors())
    found |= tensors_in("norm", third.optimizer.grad_norm)  # type: ignore[attr-defined]
    for number, param in enumerate(first.params):
        found[f"master {number}"] = master_weights(first.optimizer, param)  # type: ignore[arg-type]
    return found


def independence(subject: Subject, shapes: Shapes = ((61, 83), (129,), (0,), ())) -> None:
    """Law 11: torch's default dtype and default device change nothing.

    Steps with and without clipping and centralization, packed and full state dicts, and the results
    of loading either are the same, bit for bit and in dtype, under each of ``DEFAULTS``.
    """
    # other defaults first, so that tensors cached under them would show
    found = []
    for default in DEFAULTS:
        forget_tables()
        with torch_defaults(*default):
            found.append(_results(subject, shapes))
    with torch_defaults(torch.float32):
        expected = _results(subject, shapes)
    for got, (dtype, device) in zip(found, DEFAULTS, strict=True):
        assert_same(f"independence: default dtype {dtype}, device {device}", expected, got)
