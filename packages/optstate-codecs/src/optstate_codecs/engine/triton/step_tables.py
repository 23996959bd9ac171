"""The kernel's tables that change every step: gradient addresses and the rule's scalars.

One set of scalars serves all parameters of a group with the same step count. Scalars are computed
in float64 where the step counts lie: on the host, or on the device (``fused=True``,
``capturable=True``), so that the host does not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.counts import advance, as_step
from optstate_codecs.engine.capture import capturing, constant_table
from optstate_codecs.engine.triton.buckets import Bucket
from optstate_codecs.engine.triton.work_tables import uploaded
from optstate_codecs.rules import Rule

__all__ = ["StepTable"]


class StepTable:
    """Gradient addresses and scalars for the parameters of some buckets.

    Attributes:
        buckets: each with start and stop of its slice of the addresses and of ``scalar_set``.
        scalar_set: the index of each parameter's set of scalars, int32.
        on_host: whether step counts lie on the host.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        param_steps = [param_step for bucket in buckets for param_step in bucket.param_steps]
        ends = list(accumulate(len(bucket.param_steps) for bucket in buckets))
        self.buckets = list(zip(buckets, [0, *ends], ends, strict=False))
        self._positions = [p for bucket in buckets for p in bucket.positions]
        self._device = param_steps[0].param.device
        self._steps = [param_step.state["step"] for param_step in param_steps]
        self._groups = [param_step.group for param_step in param_steps]
        self.on_host = self._steps[0].device.type == "cpu"
        self._last: tuple[list[int], Tensor] | None = None
        self._counters = _counters(self._steps)
        self._largest = 0.0
        self._versions: list[int] = []
        self.scalar_set = self._assign_sets()

    def _assign_sets(self) -> Tensor:
        """Find which parameters share a set of scalars, and return each parameter's."""
        keys = [
            (group, float(step) if self.on_host else float(number))
            for number, (group, step) in enumerate(zip(self._groups, self._steps, strict=True))
        ]
        if self.on_host:
            self._largest = max(step for _, step in keys)
        first: dict[Any, int] = {}
        for number, key in sorted(enumerate(keys), key=lambda item: item[1]):
            first.setdefault(key, number)
        order = {key: index for index, key in enumerate(first)}
        self._sets = [(group, self._steps[number]) for (group, _), number in first.items()]
        indices = torch.tensor([order[key] for key in keys], dtype=torch.int32, device="cpu")
        return indices.to(self._device)

    def to_device(self, scalar: Tensor | None) -> Tensor | None:
        """``scalar`` as the kernel reads it: float32, on the device of the parameters."""
        return None if scalar is None else scalar.to(self._device, torch.float32)

    def advance(self, found_inf: Tensor | None, plainly: bool) -> bool:
        """Increment the step counts, without waiting for the device where they lie there.

        ``plainly`` is as for ``counts.advance``.

        Returns:
            False where the host knows that the step is skipped.
        """
        if self.on_host and self._versions != [c._version for c in self._counters]:
            self.scalar_set = self._assign_sets()  # other code has stepped or loaded some of them
        if not self.on_host:
            # replays of a graph increment counts unseen, so that no upper bound is known
            one = None if found_inf is None else (found_inf == 0).to(torch.float32).reshape(())
            advance(self._counters, plainly, one=one)
        elif found_inf is None or not bool(found_inf):
            advance(self._counters, plainly, self._largest)
            self._largest += 1
        else:
            return False
        self._versions = [c._version for c in self._counters]
        return True

    def addresses(self, grads: list[int], avoid_copies: bool = False) -> Tensor:
        """The table of the buckets' gradient addresses, made only when one has changed.

        Args:
            grads: the addresses of all gradients of the request.
            avoid_copies: fill the table by kernels, since a copy would wait behind large ones.
        """
        if self._last is not None and self._last[0] is grads and not capturing():
            return self._last[1]
        mine = [grads[p] for p in self._positions]
        if capturing():
            # the graph's own table: the kept one is replaced when gradients move after the capture
            return constant_table(mine, self._device)
        table = (
            constant_table(mine, self._device)
            if avoid_copies
            else uploaded(torch.tensor(mine, dtype=torch.int64, device="cpu"), self._device)
        )
        self._last = grads, table
        return table

    def scalars(
        self, rule: Rule, hypers: Sequence[Any], draw: int | None, avoid_copies: bool = False
    ) -> Tensor:
        """The sets of scalars, float32 [sets, 1 + scalars]; ``avoid_copies`` as above.

        The first scalar keys random numbers: the step count, or ``counts.as_step`` of ``draw``. The
        rule's scalars follow.
        """
        groups = sorted(dict.fromkeys(group for group, _ in self._sets))
        folded = [self._fold(rule, hypers[group], group, draw) for group in groups]
        if all(isinstance(sets, list) for sets in folded):
            flat = _on_host([values for sets in folded for values in sets])
            if avoid_copies:
                bits = flat.view(torch.int32).flatten().tolist()
                filled = constant_table(bits, self._device, torch.int32)
                return filled.view(torch.float32).view(flat.shape)
            return uploaded(flat, self._device)
        return torch.cat(
            [
                sets if isinstance(sets, Tensor) else uploaded(_on_host(sets), self._device)
                for sets in folded
            ]
        )

    def _fold(
        self, rule: Rule, hyper: Any, group: int, draw: int | None
    ) -> list[list[float]] | Tensor:
        """A group's sets: numbers, or a tensor where only the device knows one of them."""
        steps = [step for owner, step in self._sets if owner == group]
        if self.on_host:
            counts = [float(step) for step in steps]
            sets: list[list[Any]] = [
                [c if draw is None else as_step(draw), *rule.device_row(hyper, c)] for c in counts
            ]
            if not any(isinstance(value, Tensor) for values in sets for value in values):
                return sets
            vector = torch.tensor(counts, dtype=torch.float64, device="cpu").to(self._device)
        else:
            vector = torch.stack(steps).to(torch.float64)
        columns = [
            value.to(torch.float32).expand(len(steps))
            if isinstance(value, Tensor)
            else torch.full((len(steps),), value, dtype=torch.float32, device=self._device)
            for value in (
                vector if draw is None else as_step(draw),
                *rule.device_row(hyper, vector),
            )
        ]
        return torch.stack(columns, 1)


def _on_host(sets: list[list[float]]) -> Tensor:
    return torch.tensor(sets, dtype=torch.float32, device="cpu")


def _counters(steps: Sequence[Tensor]) -> list[Tensor]:
    """The fewest tensors to increment: a shared base tensor where all of its views are here."""
    views: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for step in steps:
        base = step._base if step._base is not None else step
        views.setdefault(id(base), (base, []))[1].append(step)
    found = []
    for base, members in views.values():
        found += [base] if base.numel() == len(members) else members
    return found
