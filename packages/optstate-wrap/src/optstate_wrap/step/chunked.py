"""The step: chunk by chunk, decode, let the inner optimizer step, encode, store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.engine import ParamStep
from optstate_codecs.errors import StepError
from optstate_wrap.delegate import own_step
from optstate_wrap.policies import Policy
from optstate_wrap.state.decoded import States
from optstate_wrap.state.encoder import Encoder
from optstate_wrap.state.parts import length
from optstate_wrap.state.record import Coded, Record, decode_state, select
from optstate_wrap.state.store import Store
from optstate_wrap.step.dense import dense_for_fused
from optstate_wrap.step.fused import Fused, Undecoded, ValueAccess
from optstate_wrap.step.pieces import Layout, ParamChunk, chunks
from optstate_wrap.step.scratch import Scratch
from optstate_wrap.step.timing import Timer
from optstate_wrap.step.transaction import Transaction, borrowed, changes, put, restore

__all__ = ["Engine"]

Closure = Callable[[], Any]


class Engine:
    """Steps an inner optimizer whose state a store keeps.

    Args:
        inner: its state is empty between steps.
        policy: which codec stores which key.
        store: where records are.
        chunk: parameters in a chunk.
        first_chunk: in a chunk of the step that creates the state.
        seed: keys every random number.
        fused: which parameters may be stepped by the codecs' engine, see ``Fused``.

    Attributes:
        encoder: decides how state is cut and stored, and counts steps.
        states: what users read and write of the state.
    """

    def __init__(
        self,
        inner: Optimizer,
        policy: Policy,
        store: Store,
        chunk: int,
        first_chunk: int,
        seed: int,
        fused: bool | None = False,
    ) -> None:
        self.inner = inner
        self.store = store
        self.first_chunk = first_chunk
        self.encoder = Encoder(inner, policy, chunk, seed)
        # what the last part of a step has made of the groups, for the end of the step
        self._parted: list[dict[str, Any]] | None = None
        self.timer = Timer()
        self.scratch = Scratch()
        self.fused = Fused(fused, seed, store)
        self.states = States(store, self.encoder, self.fused)

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return self.encoder.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.encoder.steps = value

    def step(
        self,
        closure: Closure | None = None,
        some: Collection[Tensor] | None = None,
        refuse: Callable[[Sequence[ParamChunk]], None] | None = None,
    ) -> Any:
        """Step all parameters that have gradients.

        Args:
            closure: only for an optimizer that is not stepped in chunks, which then calls it.
            some: only these, as a part of the next step: the groups' values and ``steps`` change
                when that is taken. Not where the optimizer is not stepped in chunks.
            refuse: raises, before anything changes, if some of these pieces cannot be stepped.

        Raises:
            StepError: from what went wrong; every parameter is before its step or after it.
        """
        self.states.write_back()
        plan = [piece for piece in self.encoder.plan() if some is None or piece.param in some]
        if refuse is not None:
            refuse(plan)
        self.states.forget()
        self._recut(plan)
        transaction = Transaction(self.store, self.scratch)
        rows: list[list[ParamChunk]] = [plan]
        at, phase, loss = 0, ["fused"], None
        try:
            with borrowed(self.inner) as before:
                rows = self._rows(self._step_fused(plan, transaction, some is None), plan)
                phase[0] = "load"
                self.store.expect(rows)
                for at, row in enumerate(rows):
                    if at:
                        restore(self.inner.param_groups, before)
                    loss = self._step_row(row, transaction, phase, closure)
                if some is not None:
                    self._parted = changes(self.inner.param_groups, before)
                    restore(self.inner.param_groups, before)
                elif not rows and self._parted is not None:
                    put(self.inner.param_groups, self._parted)
        except BaseException as error:
            self.fused.finish(False)
            transaction.roll_back()
            if not isinstance(error, Exception):
                raise
            where = f"chunk {at + 1} of {len(rows)} ({phase[0]})"
            raise self._failed(error, plan, where, transaction.done) from error
        finally:
            self.scratch.release()
            self.store.end(some is None)
        if some is None:
            self.fused.finish()
            self._parted = None
            self.steps += 1
        return loss

    def _rows(self, left: list[ParamChunk], plan: list[ParamChunk]) -> list[list[ParamChunk]]:
        if not self.encoder.chunked:
            return [left]
        size = self.encoder.chunk if len(self.store) else self.first_chunk
        rows = [[p for p in row if p.param.grad is not None] for row in chunks(left, size)]
        rows = [row for row in rows if row]
        # without any gradient, the optimizer may still count the step
        return rows if rows or len(left) < len(plan) or self._parted is not None else [[]]

    def _step_fused(
        self, plan: list[ParamChunk], transaction: Transaction, last: bool
    ) -> list[ParamChunk]:
        """Step what the codecs' engine can; gives the pieces that are left."""
        if not self.encoder.chunked or not len(self.store) or not self.fused.begins(self.inner):
            return plan
        param_steps, taken, left = list[ParamStep](), list[ParamChunk](), list[ParamChunk]()
        for _, group in groupby(plan, key=lambda piece: piece.number):
            together = list(group)
            found = self._fused_param_steps(together)
            param_steps += found
            (taken if found else left).extend(together)
        if param_steps:
            with self.timer.part("inner_step_ms"):
                try:
                    self.fused.step(self.inner, param_steps, taken, self.steps + 1, last)
                finally:
                    stepped = set(map(id, self.fused.done))
                    pairs = zip(taken, param_steps, strict=True)
                    missed = {
                        piece.number for piece, param_step in pairs if id(param_step) not in stepped
                    }
                    numbers = dict.fromkeys(piece.number for piece in taken)
                    transaction.done += [number for number in numbers if number not in missed]
        return left

    def _fused_param_steps(self, together: Sequence[ParamChunk]) -> list[ParamStep]:
        param = together[0].param
        records = self.store.peek(param)
        if param.grad is None or not records:
            return []
        try:
            formats = self.encoder.formats(param, Undecoded(records[0]))
        except ValueAccess:
            return []  # a policy that wants to see numbers sees them decoded
        return self.fused.takes(together, records, formats)

    def _step_row(
        self, row: Sequence[ParamChunk], transaction: Transaction, phase: list[str], closure: Any
    ) -> Any:
        inner, timer, store = self.inner, self.timer, self.store

        def keep(value: Tensor) -> None:
            if not store.lent(value):
                transaction.keep(value)

        phase[0] = "load"
        with timer.part("materialize_ms"):
            transaction.keep_all(row)
            records = store.load(row)
            phase[0] = "decode"
            stand_ins = [piece.stand_in() for piece in row]
            state: defaultdict[Any, Any] = defaultdict(dict, self.states.extra)
            for piece, stand_in, record in zip(row, stand_ins, records, strict=True):
                if record:
                    state[stand_in] = decode_state(record, piece.param, keep)
                if self.states.foreign and (lent := self.states.lend(piece)):
                    state[stand_in] = {**state.get(stand_in, {}), **lent}
        if self.encoder.chunked:
            members: list[list[Tensor]] = [[] for _ in inner.param_groups]
            for piece, stand_in in zip(row, stand_ins, strict=True):
                members[piece.group] += [stand_in] * piece.times
            for group, params in zip(inner.param_groups, members, strict=True):
                group["params"] = params
        inner.state = state
        phase[0] = "step"
        with timer.part("inner_step_ms"), dense_for_fused(inner):
            step = own_step(inner)
            loss = step(inner, closure) if closure is not None else step(inner)
        phase[0] = "encode"
        with timer.part("commit_ms"):
            new = []
            for piece, stand_in, record in zip(row, stand_ins, records, strict=True):
                left = inner.state.pop(stand_in, {})
                self.states.regain(piece, left)
                new.append(self._encoded(piece, stand_in, left, record))
            phase[0] = "store"
            transaction.add(row, new)
            transaction.commit(row)
        self.states.extra = dict(inner.state)
        return loss

    def _encoded(
        self, piece: ParamChunk, stand_in: Tensor, state: Mapping[str, Any], old: Record | None
    ) -> Record:
        coded = old is not None and any(isinstance(value, Coded) for value in old.values())
        if old is not None and coded and piece.param.grad is None:
            # it was not stepped, so it is not rounded again
            return old
        record = self.encoder.encode(piece, stand_in, state)
        found_inf = getattr(self.inner, "found_inf", None)
        return select(found_inf, old, record) if coded and old and found_inf is not None else record

    def _recut(self, plan: Sequence[ParamChunk]) -> None:
        """Cut anew what was stored when tensors were split elsewhere, or lay otherwise."""
        store = self.store
        for place, piece in enumerate(plan):
            if piece.part:
                continue
            kept = store.peek(piece.param)
            if not kept or len(kept) == piece.parts == 1:
                continue
            layout, now = store.layout(piece.param), Layout.of(piece.param)
            if len(kept) == piece.parts and length(kept[0]) == piece.stop and layout == now:
                continue
            # what has another shape now is not stepped
            if piece.parts == 1 or layout.shape == now.shape:
                self.states.recut(piece.param, plan[place : place + piece.parts])

    def _failed(
        self,
        error: Exception,
        plan: Sequence[ParamChunk],
        where: str,
        done: list[int],
    ) -> StepError:
        numbers = sorted({piece.number for piece in plan if piece.param.grad is not None})
        unstepped = [number for number in numbers if number not in done]
        torn: list[int] = []
        if isinstance(error, StepError):
            # of the stream, which knows nothing of other parameters
            torn = error.torn
            unstepped = [number for number in unstepped if number not in torn]
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return StepError.of(error, f" in {where}", done, unstepped, torn)
