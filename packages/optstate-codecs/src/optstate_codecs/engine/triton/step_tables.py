"""The tables that change every step: gradient addresses and the rule's scalars.

One row of scalars serves all units of a group that have taken the same number of steps. Where the
counts lie on the host the row is folded there in float64; where they lie on the device
(``fused=True``, ``capturable=True``), it is folded there, so that nothing waits.
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

__all__ = ["RowTable"]


class RowTable:
    """Gradient addresses, rows, and each unit's row, for the units of some buckets.

    Attributes:
        buckets: each with the slice that is its own of the addresses and of ``row_of``.
        row_of: the row of each unit, int32.
        on_host: whether step counts lie there.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        param_steps = [param_step for bucket in buckets for param_step in bucket.param_steps]
        ends = list(accumulate(len(bucket.param_steps) for bucket in buckets))
        self.buckets = list(zip(buckets, [0, *ends], ends, strict=False))
        self._places = [place for bucket in buckets for place in bucket.places]
        self._device = param_steps[0].param.device
        self._steps = [param_step.state["step"] for param_step in param_steps]
        self._groups = [param_step.group for param_step in param_steps]
        self.on_host = self._steps[0].device.type == "cpu"
        self._last: tuple[list[int], Tensor] | None = None
        self._counters = _counters(self._steps)
        self._largest = 0.0
        self._versions: list[int] = []
        self.row_of = self._sort()

    def _sort(self) -> Tensor:
        """Find which units share a row, and return each unit's."""
        keys = [
            (group, float(step) if self.on_host else float(place))
            for place, (group, step) in enumerate(zip(self._groups, self._steps, strict=True))
        ]
        if self.on_host:
            self._largest = max(step for _, step in keys)
        first: dict[Any, int] = {}
        for place, key in sorted(enumerate(keys), key=lambda item: item[1]):
            first.setdefault(key, place)
        order = {key: row for row, key in enumerate(first)}
        self._rows = [(group, self._steps[place]) for (group, _), place in first.items()]
        rows = torch.tensor([order[key] for key in keys], dtype=torch.int32, device="cpu")
        return rows.to(self._device)

    def beside(self, scalar: Tensor | None) -> Tensor | None:
        """``scalar`` as the kernel reads it: float32, on the device of the parameters."""
        return None if scalar is None else scalar.to(self._device, torch.float32)

    def advance(self, found_inf: Tensor | None, plainly: bool) -> bool:
        """Count a step, on the device without waiting for it where the counts are there.

        ``plainly`` is as for ``counts.advance``.

        Returns:
            False where the host knows that the step is to be skipped.
        """
        if self.on_host and self._versions != [c._version for c in self._counters]:
            self.row_of = self._sort()  # somebody else has stepped or loaded some of the units
        if not self.on_host:
            # nobody knows how often a graph has been replayed, and so how large counts are
            one = None if found_inf is None else (found_inf == 0).to(torch.float32).reshape(())
            advance(self._counters, plainly, one=one)
        elif found_inf is None or not bool(found_inf):
            advance(self._counters, plainly, self._largest)
            self._largest += 1
        else:
            return False
        self._versions = [c._version for c in self._counters]
        return True

    def addresses(self, grads: list[int], busy: bool = False) -> Tensor:
        """The job's gradient ``addresses`` on the device; copied only when one has changed.

        ``busy`` says that copies from the host would wait for large ones.
        """
        if self._last is not None and self._last[0] is grads and not capturing():
            return self._last[1]
        mine = [grads[place] for place in self._places]
        if capturing():
            # a table of the graph's own: the kept one goes when gradients move after the capture
            return constant_table(mine, self._device)
        table = (
            constant_table(mine, self._device)
            if busy
            else uploaded(torch.tensor(mine, dtype=torch.int64, device="cpu"), self._device)
        )
        self._last = grads, table
        return table

    def values(
        self, rule: Rule, hypers: Sequence[Any], draw: int | None, busy: bool = False
    ) -> Tensor:
        """The rows, float32 [rows, 1 + scalars]: what keys random numbers, then the rule's.

        The key is the step count, or what ``counts.as_step`` makes of ``draw``; ``busy`` as above.
        """
        groups = sorted(dict.fromkeys(group for group, _ in self._rows))
        folded = [self._fold(rule, hypers[group], group, draw) for group in groups]
        if all(isinstance(rows, list) for rows in folded):
            flat = _on_host([row for rows in folded for row in rows])
            if busy:
                bits = flat.view(torch.int32).flatten().tolist()
                filled = constant_table(bits, self._device, torch.int32)
                return filled.view(torch.float32).view(flat.shape)
            return uploaded(flat, self._device)
        return torch.cat(
            [
                rows if isinstance(rows, Tensor) else uploaded(_on_host(rows), self._device)
                for rows in folded
            ]
        )

    def _fold(
        self, rule: Rule, hyper: Any, group: int, draw: int | None
    ) -> list[list[float]] | Tensor:
        """A group's rows: numbers, or a tensor where something is known to the device only."""
        steps = [step for number, step in self._rows if number == group]
        if self.on_host:
            counts = [float(step) for step in steps]
            rows: list[list[Any]] = [
                [c if draw is None else as_step(draw), *rule.device_row(hyper, c)] for c in counts
            ]
            if not any(isinstance(value, Tensor) for row in rows for value in row):
                return rows
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


def _on_host(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def _counters(steps: Sequence[Tensor]) -> list[Tensor]:
    """The fewest tensors whose increment counts a step: whole banks where all of one is here."""
    banks: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for step in steps:
        bank = step._base if step._base is not None else step
        banks.setdefault(id(bank), (bank, []))[1].append(step)
    found = []
    for bank, members in banks.values():
        found += [bank] if bank.numel() == len(members) else members
    return found
