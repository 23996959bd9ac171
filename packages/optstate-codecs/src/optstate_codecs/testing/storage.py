"""Laws 9 and 10: state has the predicted bytes; odd inputs work, or raise and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from optstate_codecs.memory import predicted_state_bytes, state_bytes
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.sharding import local_of
from optstate_codecs.state.layout import bound, slices
from optstate_codecs.testing.subject import (
    SHAPES,
    Subject,
    Trainer,
    assert_close,
    assert_same,
    normal,
    plain,
)

__all__ = ["bytes_are_said", "no_surprises"]


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the largest tensor that any operation creates."""

    numel: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, tensor.numel())
        return out


def bytes_are_said(subject: Subject) -> None:
    """Law 9: the state takes the predicted bytes, and a step's temporaries stay within a slice."""
    shapes = (*SHAPES, (1024, 1024))
    trainer = subject.trainer(shapes=shapes)
    trainer.run(5)
    optimizer = trainer.optimizer
    predicted = predicted_state_bytes(optimizer)  # type: ignore[arg-type]
    stored = state_bytes(optimizer)
    if stored != predicted:
        raise AssertionError(f"bytes: {stored} stored, {predicted} predicted")
    for param in trainer.params:
        param.grad = torch.ones_like(param)
    with _Largest() as largest:  # type: ignore[no-untyped-call]
        optimizer.step()
    last = local_of(trainer.params[-1])
    formats = bound(optimizer.group_formats(optimizer.param_groups[-1]), last)  # type: ignore[attr-defined]
    start, stop = next(slices(last, formats.values()))
    if subject.device == "cpu" and largest.numel > stop - start:
        raise AssertionError(f"bytes: a temporary of {largest.numel} elements in a step")


def _layouts(device: str) -> dict[str, Tensor]:
    base = normal((4, 6, 5, 7), torch.Generator().manual_seed(0)).to(device)
    return {
        "contiguous": base.clone(),
        "channels last": base.to(memory_format=torch.channels_last),
        "transposed": base.clone().transpose(0, 3),
        "strided": torch.cat([base, base], 3)[..., ::2],
        "offset": torch.cat([base.view(-1), base.view(-1)])[3 : 3 + base.numel()],
    }


def _layouts_agree(subject: Subject) -> None:
    """For every layout of a parameter, steps are those of exact arithmetic within rounding."""
    if subject.near is None or not subject.wide or subject.mesh is not None:
        return
    for grad_layout in ("same", "contiguous"):
        for name, layout in _layouts(subject.device).items():
            data = layout.to(subject.dtype)
            start = data.to(torch.float64, copy=True).cpu()
            param, exact = Parameter(data), Parameter(start.clone())
            optimizer = subject.make([param], lr=1e-2, weight_decay=0.0)
            reference = subject.near([exact], lr=1e-2)
            for t in range(3):
                noise = torch.Generator().manual_seed(t)
                grad = normal(data.shape, noise).double()
                exact.grad = grad
                param.grad = grad.to(param.device, param.dtype)
                if grad_layout == "same":
                    param.grad = torch.empty_like(param).copy_(grad)
                optimizer.step()
                reference.step()
            moved = param.detach().double().cpu() - start
            assert_close(f"no surprises: {name}", exact.detach() - start, moved, subject.error)


def _refused(subject: Subject, trainer: Trainer, spoil: Callable[[], Any], words: str) -> None:
    before = trainer.tensors()
    groups = [dict(g) for g in trainer.optimizer.param_groups]
    try:
        spoil()
    except (TypeError, ValueError, KeyError) as error:
        if words not in str(error):
            raise AssertionError(f"{subject.name}: {words!r} is not in {error!s}") from error
    else:
        raise AssertionError(f"{subject.name}: accepted bad {words}")
    assert_same(f"no surprises: refused {words}", before, trainer.tensors())
    if len(groups) != len(trainer.optimizer.param_groups):
        raise AssertionError(f"{subject.name}: refused {words} but changed the groups")


def no_surprises(subject: Subject) -> None:
    """Law 10: odd shapes and layouts work; bad input raises and changes nothing.

    Errors are checked of optimizers of the family; those of others are torch's.
    """
    trainer = subject.trainer(lambda p: subject.make(p, lr=0.05))
    start = [plain(p).clone() for p in trainer.params]
    for i, param in enumerate(map(plain, trainer.run(6).params)):
        if param.dtype != subject.dtype or not torch.isfinite(param).all():
            raise AssertionError(f"no surprises: parameter {i} came out wrong")
        if param.numel() and torch.equal(param, start[i]):
            raise AssertionError(f"no surprises: parameter {i} did not move")
    _layouts_agree(subject)
    if isinstance(trainer.optimizer, CodedOptimizer):
        _errors_change_nothing(subject)


def _errors_change_nothing(subject: Subject) -> None:
    trainer = subject.trainer().run(3)
    optimizer, first = trainer.optimizer, trainer.params[0]
    for key, bad in (
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", "fast"),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("eps", -1e-8),
        ("weight_decay", float("inf")),
    ):
        if key not in optimizer.defaults:
            continue
        extra = {"params": [Parameter(first.detach().clone())], key: bad}
        _refused(subject, trainer, partial(optimizer.add_param_group, extra), key)
        _refused(subject, trainer, partial(subject.make, [first], **{key: bad}), key)

    for param in trainer.params:
        param.grad = torch.ones_like(param)
    trainer.params[-1].grad = None
    first.grad = None
    if subject.mesh is not None:
        return
    trainer.params[1].grad = torch.ones_like(trainer.params[1]).to_sparse()
    _refused(subject, trainer, optimizer.step, "dense")
