"""The step of a wrapped optimizer: decodes state, lets the inner optimizer step, and encodes it.

It works batch by batch, so that only the state of one batch is decoded at a time.
"""

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
from optstate_wrap.step.fused import FusedStep, KeysOnly, ValueAccess
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
    """Steps an inner optimizer whose state is in a store.

    Args:
        inner: the optimizer; its own ``state`` is empty between steps.
        policy: which codec stores which state key.
        store: holds the records.
        chunk_size: elements in a batch, and above which a parameter is split.
        first_batch_size: elements in a batch of the step that creates the state.
        seed: keys every random number.
        fused: which parameters the codecs' engine may step, see ``FusedStep``.

    Attributes:
        encoder: splits and encodes state, and counts steps.
        states: the decoded state that users read and write.
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
        # changes to the groups' values by the latest part of a step, for the end of the step
        self._group_changes: list[dict[str, Any]] | None = None
        self.timer = Timer()
        self.scratch = Scratch()
        self.fused = FusedStep(fused, seed, store)
        self.states = DecodedStates(store, self.encoder, self.fused)

    def step(
        self,
        closure: Closure | None = None,
        some: Collection[Tensor] | None = None,
        check: Callable[[Sequence[ParamChunk]], None] | None = None,
    ) -> Any:
        """Step all parameters that have gradients.

        Args:
            closure: passed to the inner optimizer; only if that is not stepped in batches.
            some: step only these parameters, as a part of the next whole step, which then changes
                the groups' values and the step count. Only if the optimizer is stepped in batches.
            check: raises if some of the chunks cannot be stepped; called before anything changes.

        Raises:
            StepError: from the error of a failed step; every parameter is before or after its step.
        """
        self.states.write_back()
        chunks = [c for c in self.encoder.split() if some is None or c.param in some]
        if check is not None:
            check(chunks)
        self.states.discard_read_states()
        self._resplit(chunks)
        transaction = Transaction(self.store, self.scratch)
        batches: list[list[ParamChunk]] = [chunks]
        at, phase, loss = 0, ["fused"], None
        try:
            with guarded_inner(self.inner) as before:
                batches = self._batches(self._step_fused(chunks, transaction, some is None), chunks)
                phase[0] = "load"
                self.store.expect(batches)
                for at, batch in enumerate(batches):
                    if at:
                        restore_groups(self.inner.param_groups, before)
                    loss = self._step_batch(batch, transaction, phase, closure)
                if some is not None:
                    self._group_changes = group_changes(self.inner.param_groups, before)
                    restore_groups(self.inner.param_groups, before)
                elif not batches and self._group_changes is not None:
                    set_entries(self.inner.param_groups, self._group_changes)
        except BaseException as error:
            self.fused.finish(False)
            transaction.roll_back()
            if not isinstance(error, Exception):
                raise
            where = f"chunk {at + 1} of {len(batches)} ({phase[0]})"
            raise self._failed(error, chunks, where, transaction.done) from error
        finally:
            self.scratch.release()
            self.store.end(some is None)
        if some is None:
            self.fused.finish()
            self._group_changes = None
            self.encoder.steps += 1
        return loss

    def _batches(self, left: list[ParamChunk], chunks: list[ParamChunk]) -> list[list[ParamChunk]]:
        """The batches of those ``chunks`` that are ``left`` after the fused step."""
        if not self.encoder.chunked:
            return [left]
        size = self.encoder.chunk_size if len(self.store) else self.first_batch_size
        batches = [[c for c in b if c.param.grad is not None] for b in make_batches(left, size)]
        batches = [batch for batch in batches if batch]
        # even without any gradient, the optimizer may count the step
        no_step_yet = len(left) == len(chunks) and self._group_changes is None
        return [[]] if not batches and no_step_yet else batches

    def _step_fused(
        self, chunks: list[ParamChunk], transaction: Transaction, last: bool
    ) -> list[ParamChunk]:
        """Step the parameters that the codecs' engine takes; return the other chunks."""
        if not self.encoder.chunked or not len(self.store) or not self.fused.start_step(self.inner):
            return chunks
        param_steps, taken, left = list[ParamStep](), list[ParamChunk](), list[ParamChunk]()
        for _, group in groupby(chunks, key=lambda chunk: chunk.number):
            of_param = list(group)
            found = self._fused_param_steps(of_param)
            param_steps += found
            (taken if found else left).extend(of_param)
        if param_steps:
            with self.timer.part("inner_step_ms"):
                try:
                    self.fused.step(self.inner, param_steps, taken, self.encoder.steps + 1, last)
                finally:
                    stepped = set(map(id, self.fused.done))
                    pairs = zip(taken, param_steps, strict=True)
                    missed = {c.number for c, step in pairs if id(step) not in stepped}
                    numbers = dict.fromkeys(chunk.number for chunk in taken)
                    transaction.done += [number for number in numbers if number not in missed]
        return left

    def _fused_param_steps(self, chunks: Sequence[ParamChunk]) -> list[ParamStep]:
        """What the codecs' engine steps for all chunks of a parameter; empty if it does not."""
        param = chunks[0].param
        records = self.store.latest_records(param)
        if param.grad is None or not records:
            return []
        if not self.fused.may_take(records):
            self.fused.release(param)
            return []
        try:
            formats = self.encoder.formats(param, KeysOnly(records[0]))
        except ValueAccess:
            return []  # the policy reads values, which have to be decoded for it
        return self.fused.param_steps_for(chunks, records, formats)

    def _step_batch(
        self, batch: Sequence[ParamChunk], transaction: Transaction, phase: list[str], closure: Any
    ) -> Any:
        inner, timer, store = self.inner, self.timer, self.store
        aliases: list[Tensor] = []
        phase[0] = "load"
        with timer.part("materialize_ms"):
            records = store.load(batch)
            phase[0] = "decode"
            stand_ins = [chunk.stand_in() for chunk in batch]
            state: defaultdict[Any, Any] = defaultdict(dict, self.states.extra)
            for chunk, stand_in, record in zip(batch, stand_ins, records, strict=True):
                if record:
                    state[stand_in] = decode_state(record, chunk.param, aliases.append)
                if self.states.foreign and (foreign := self.states.foreign_entries(chunk)):
                    state[stand_in] = {**state.get(stand_in, {}), **foreign}
            transaction.keep(batch, [value for value in aliases if not store.is_staged(value)])
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
                stepped = inner.state.pop(stand_in, {})
                self.states.take_foreign_back(chunk, stepped)
                new.append(self._encoded(chunk, stand_in, stepped, record))
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
            # not stepped, so not rounded again
            return old
        record = self.encoder.encode(chunk, stand_in, state)
        found_inf = getattr(self.inner, "found_inf", None)
        return select(found_inf, old, record) if coded and old and found_inf is not None else record

    def _resplit(self, chunks: Sequence[ParamChunk]) -> None:
        """Split stored state again if its parameter is split or laid out differently now."""
        store = self.store
        for index, chunk in enumerate(chunks):
            if chunk.part:
                continue
            records = store.latest_records(chunk.param)
            if not records or len(records) == chunk.parts == 1:
                continue
            old, new = store.layout(chunk.param), Layout.of(chunk.param)
            as_stored = len(records) == chunk.parts and record_numel(records[0]) == chunk.stop
            # a split parameter of another shape is not stepped
            if not (as_stored and old == new) and (chunk.parts == 1 or old.shape == new.shape):
                self.states.resplit(chunk.param, chunks[index : index + chunk.parts])

    def _failed(
        self, error: Exception, chunks: Sequence[ParamChunk], where: str, done: list[int]
    ) -> StepError:
        numbers = sorted({chunk.number for chunk in chunks if chunk.param.grad is not None})
        unstepped = [number for number in numbers if number not in done]
        torn: list[int] = []
        if isinstance(error, StepError):
            # of the streaming executor, which knows only its own parameters
            torn = error.torn
            unstepped = [number for number in unstepped if number not in torn]
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return StepError.of(error, f" in {where}", done, unstepped, torn)
