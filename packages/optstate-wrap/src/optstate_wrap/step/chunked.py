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
from optstate_wrap.delegate import unhooked_step
from optstate_wrap.policies import Policy
from optstate_wrap.state.decoded import DecodedStates
from optstate_wrap.state.encoder import Encoder
from optstate_wrap.state.param_chunks import Layout, ParamChunk, make_batches
from optstate_wrap.state.record import Coded, Record, decode_state, select
from optstate_wrap.state.slicing import record_numel
from optstate_wrap.state.store import Store
from optstate_wrap.step.dense import dense_for_fused
from optstate_wrap.step.fused import Fused, KeysOnly, ValueAccess
from optstate_wrap.step.scratch import Scratch
from optstate_wrap.step.timing import Timer
from optstate_wrap.step.transaction import (
    Transaction,
    group_changes,
    guarded_inner,
    restore_groups,
    set_entries,
)

__all__ = ["Engine"]

Closure = Callable[[], Any]


class Engine:
    """Steps an inner optimizer whose state a store keeps.

    Args:
        inner: its state is empty between steps.
        policy: which codec stores which key.
        store: where records are.
        chunk_size: parameters in a batch.
        first_batch_size: in a batch of the step that creates the state.
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
        chunk_size: int,
        first_batch_size: int,
        seed: int,
        fused: bool | None = False,
    ) -> None:
        self.inner = inner
        self.store = store
        self.first_batch_size = first_batch_size
        self.encoder = Encoder(inner, policy, chunk_size, seed)
        # what the last part of a step has made of the groups, for the end of the step
        self._parted: list[dict[str, Any]] | None = None
        self.timer = Timer()
        self.scratch = Scratch()
        self.fused = Fused(fused, seed, store)
        self.states = DecodedStates(store, self.encoder, self.fused)

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
        check: Callable[[Sequence[ParamChunk]], None] | None = None,
    ) -> Any:
        """Step all parameters that have gradients.

        Args:
            closure: only for an optimizer that is not stepped in chunks, which then calls it.
            some: only these, as a part of the next step: the groups' values and ``steps`` change
                when that is taken. Not where the optimizer is not stepped in chunks.
            check: raises, before anything changes, if some of these chunks cannot be stepped.

        Raises:
            StepError: from what went wrong; every parameter is before its step or after it.
        """
        self.states.write_back()
        plan = [chunk for chunk in self.encoder.split() if some is None or chunk.param in some]
        if check is not None:
            check(plan)
        self.states.discard_read_states()
        self._resplit(plan)
        transaction = Transaction(self.store, self.scratch)
        batches: list[list[ParamChunk]] = [plan]
        at, phase, loss = 0, ["fused"], None
        try:
            with guarded_inner(self.inner) as before:
                batches = self._batches(self._step_fused(plan, transaction, some is None), plan)
                phase[0] = "load"
                self.store.expect(batches)
                for at, batch in enumerate(batches):
                    if at:
                        restore_groups(self.inner.param_groups, before)
                    loss = self._step_batch(batch, transaction, phase, closure)
                if some is not None:
                    self._parted = group_changes(self.inner.param_groups, before)
                    restore_groups(self.inner.param_groups, before)
                elif not batches and self._parted is not None:
                    set_entries(self.inner.param_groups, self._parted)
        except BaseException as error:
            self.fused.finish(False)
            transaction.roll_back()
            if not isinstance(error, Exception):
                raise
            where = f"chunk {at + 1} of {len(batches)} ({phase[0]})"
            raise self._failed(error, plan, where, transaction.done) from error
        finally:
            self.scratch.release()
            self.store.end(some is None)
        if some is None:
            self.fused.finish()
            self._parted = None
            self.steps += 1
        return loss

    def _batches(self, left: list[ParamChunk], plan: list[ParamChunk]) -> list[list[ParamChunk]]:
        if not self.encoder.chunked:
            return [left]
        size = self.encoder.chunk_size if len(self.store) else self.first_batch_size
        batches = [
            [p for p in batch if p.param.grad is not None] for batch in make_batches(left, size)
        ]
        batches = [batch for batch in batches if batch]
        # without any gradient, the optimizer may still count the step
        return batches if batches or len(left) < len(plan) or self._parted is not None else [[]]

    def _step_fused(
        self, plan: list[ParamChunk], transaction: Transaction, last: bool
    ) -> list[ParamChunk]:
        """Step what the codecs' engine can; gives the chunks that are left."""
        if not self.encoder.chunked or not len(self.store) or not self.fused.start_step(self.inner):
            return plan
        param_steps, taken, left = list[ParamStep](), list[ParamChunk](), list[ParamChunk]()
        for _, group in groupby(plan, key=lambda chunk: chunk.number):
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
                        chunk.number for chunk, param_step in pairs if id(param_step) not in stepped
                    }
                    numbers = dict.fromkeys(chunk.number for chunk in taken)
                    transaction.done += [number for number in numbers if number not in missed]
        return left

    def _fused_param_steps(self, together: Sequence[ParamChunk]) -> list[ParamStep]:
        param = together[0].param
        records = self.store.latest_records(param)
        if param.grad is None or not records:
            return []
        try:
            formats = self.encoder.formats(param, KeysOnly(records[0]))
        except ValueAccess:
            return []  # a policy that wants to see numbers sees them decoded
        return self.fused.param_steps_for(together, records, formats)

    def _step_batch(
        self, batch: Sequence[ParamChunk], transaction: Transaction, phase: list[str], closure: Any
    ) -> Any:
        inner, timer, store = self.inner, self.timer, self.store

        def save_unstaged(value: Tensor) -> None:
            if not store.is_staged(value):
                transaction.save(value)

        phase[0] = "load"
        with timer.part("materialize_ms"):
            transaction.save_params(batch)
            records = store.load(batch)
            phase[0] = "decode"
            stand_ins = [chunk.stand_in() for chunk in batch]
            state: defaultdict[Any, Any] = defaultdict(dict, self.states.extra)
            for chunk, stand_in, record in zip(batch, stand_ins, records, strict=True):
                if record:
                    state[stand_in] = decode_state(record, chunk.param, save_unstaged)
                if self.states.foreign and (foreign := self.states.foreign_entries(chunk)):
                    state[stand_in] = {**state.get(stand_in, {}), **foreign}
        if self.encoder.chunked:
            members: list[list[Tensor]] = [[] for _ in inner.param_groups]
            for chunk, stand_in in zip(batch, stand_ins, strict=True):
                members[chunk.group] += [stand_in] * chunk.times
            for group, params in zip(inner.param_groups, members, strict=True):
                group["params"] = params
        inner.state = state
        phase[0] = "step"
        with timer.part("inner_step_ms"), dense_for_fused(inner):
            step = unhooked_step(inner)
            loss = step(inner, closure) if closure is not None else step(inner)
        phase[0] = "encode"
        with timer.part("commit_ms"):
            new = []
            for chunk, stand_in, record in zip(batch, stand_ins, records, strict=True):
                left = inner.state.pop(stand_in, {})
                self.states.take_foreign_back(chunk, left)
                new.append(self._encoded(chunk, stand_in, left, record))
            phase[0] = "store"
            transaction.add(batch, new)
            transaction.commit(batch)
        self.states.extra = dict(inner.state)
        return loss

    def _encoded(
        self, chunk: ParamChunk, stand_in: Tensor, state: Mapping[str, Any], old: Record | None
    ) -> Record:
        coded = old is not None and any(isinstance(value, Coded) for value in old.values())
        if old is not None and coded and chunk.param.grad is None:
            # it was not stepped, so it is not rounded again
            return old
        record = self.encoder.encode(chunk, stand_in, state)
        found_inf = getattr(self.inner, "found_inf", None)
        return select(found_inf, old, record) if coded and old and found_inf is not None else record

    def _resplit(self, plan: Sequence[ParamChunk]) -> None:
        """Cut anew what was stored when tensors were split elsewhere, or lay otherwise."""
        store = self.store
        for place, chunk in enumerate(plan):
            if chunk.part:
                continue
            kept = store.latest_records(chunk.param)
            if not kept or len(kept) == chunk.parts == 1:
                continue
            layout, now = store.layout(chunk.param), Layout.of(chunk.param)
            if len(kept) == chunk.parts and record_numel(kept[0]) == chunk.stop and layout == now:
                continue
            # what has another shape now is not stepped
            if chunk.parts == 1 or layout.shape == now.shape:
                self.states.resplit(chunk.param, plan[place : place + chunk.parts])

    def _failed(
        self,
        error: Exception,
        plan: Sequence[ParamChunk],
        where: str,
        done: list[int],
    ) -> StepError:
        numbers = sorted({chunk.number for chunk in plan if chunk.param.grad is not None})
        unstepped = [number for number in numbers if number not in done]
        torn: list[int] = []
        if isinstance(error, StepError):
            # of the stream, which knows nothing of other parameters
            torn = error.torn
            unstepped = [number for number in unstepped if number not in torn]
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return StepError.of(error, f" in {where}", done, unstepped, torn)
