"""The step: chunk by chunk, decode, let the inner optimizer step, encode, store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs.engine import Unit
from optstate_codecs.errors import StepError
from optstate_codecs.formats import Format
from optstate_codecs.rounding import Counter
from optstate_wrap.codecs import as_codec
from optstate_wrap.delegate import own_step
from optstate_wrap.dense import dense_for_fused
from optstate_wrap.fused import Fused, Looked, Undecoded
from optstate_wrap.parts import cut, joined
from optstate_wrap.plan import Piece, chunks, pieces
from optstate_wrap.policies import Policy
from optstate_wrap.record import Coded, Record, decode_state, encode_state, select
from optstate_wrap.scratch import Scratch
from optstate_wrap.store import Store
from optstate_wrap.timing import Timer
from optstate_wrap.transaction import Transaction, borrowed, changes, put, restore

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
        steps: how many have been taken.
        chunked: whether chunks may be stepped one by one; otherwise all are one chunk.
        splittable: whether a tensor may be stepped in parts.
        extra: what the inner optimizer keeps in ``state`` under keys that are not parameters.
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
        self.policy = policy
        self.store = store
        self.chunk = chunk
        self.first_chunk = first_chunk
        self.seed = seed
        self.steps = 0
        self.chunked = True
        self.splittable = True
        self.extra: dict[Any, Any] = {}
        # what the last part of a step has made of the groups, for the end of the step
        self._parted: list[dict[str, Any]] | None = None
        self.timer = Timer()
        self.scratch = Scratch()
        self.fused = Fused(fused, seed, store)

    def plan(self) -> list[Piece]:
        """Every piece of every parameter, in order."""
        return pieces(self.inner.param_groups, self.chunk, self.chunked and self.splittable)

    def step(self, closure: Closure | None = None, some: Collection[Tensor] | None = None) -> Any:
        """Step all parameters that have gradients.

        Args:
            closure: only for an optimizer that is not stepped in chunks, which then calls it.
            some: only these, as a part of the next step: the groups' values and ``steps`` change
                when that is taken. Not where the optimizer is not stepped in chunks.

        Raises:
            StepError: from what went wrong; every parameter is before its step or after it.
        """
        plan = [piece for piece in self.plan() if some is None or piece.param in some]
        self._recut(plan)
        transaction = Transaction(self.store, self.scratch)
        rows: list[list[Piece]] = [plan]
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

    def _rows(self, left: list[Piece], plan: list[Piece]) -> list[list[Piece]]:
        if not self.chunked:
            return [left]
        size = self.chunk if len(self.store) else self.first_chunk
        rows = [[p for p in row if p.param.grad is not None] for row in chunks(left, size)]
        rows = [row for row in rows if row]
        # without any gradient, the optimizer may still count the step
        return rows if rows or len(left) < len(plan) or self._parted is not None else [[]]

    def _step_fused(self, plan: list[Piece], transaction: Transaction, last: bool) -> list[Piece]:
        """Step what the codecs' engine can; gives the pieces that are left."""
        if not self.chunked or not len(self.store) or not self.fused.begins(self.inner):
            return plan
        units, taken, left = list[Unit](), list[Piece](), list[Piece]()
        for _, group in groupby(plan, key=lambda piece: piece.number):
            together = list(group)
            found = self._fused_units(together)
            units += found
            (taken if found else left).extend(together)
        if units:
            with self.timer.part("inner_step_ms"):
                try:
                    self.fused.step(self.inner, units, taken, self.steps + 1, last)
                finally:
                    stepped = set(map(id, self.fused.done))
                    pairs = zip(taken, units, strict=True)
                    missed = {piece.number for piece, unit in pairs if id(unit) not in stepped}
                    numbers = dict.fromkeys(piece.number for piece in taken)
                    transaction.done += [number for number in numbers if number not in missed]
        return left

    def _fused_units(self, together: Sequence[Piece]) -> list[Unit]:
        param = together[0].param
        if param.grad is None or param not in self.store:
            return []
        records = self.store.peek(param)
        try:
            formats = self._formats(param, Undecoded(records[0]))
        except Looked:
            return []  # a policy that wants to see numbers sees them decoded
        return self.fused.takes(together, records, formats)

    def _step_row(
        self, row: Sequence[Piece], transaction: Transaction, phase: list[str], closure: Any
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
            state: defaultdict[Any, Any] = defaultdict(dict, self.extra)
            for piece, stand_in, record in zip(row, stand_ins, records, strict=True):
                if record:
                    state[stand_in] = decode_state(record, piece.param, keep)
        if self.chunked:
            members: list[list[Tensor]] = [[] for _ in inner.param_groups]
            for piece, stand_in in zip(row, stand_ins, strict=True):
                members[piece.group].append(stand_in)
            for group, params in zip(inner.param_groups, members, strict=True):
                group["params"] = params
        inner.state = state
        phase[0] = "step"
        with timer.part("inner_step_ms"), dense_for_fused(inner):
            step = own_step(inner)
            loss = step(inner, closure) if closure is not None else step(inner)
        phase[0] = "encode"
        with timer.part("commit_ms"):
            new = [
                self._encoded(piece, stand_in, inner.state.pop(stand_in, {}), record)
                for piece, stand_in, record in zip(row, stand_ins, records, strict=True)
            ]
            phase[0] = "store"
            transaction.add(row, new)
            transaction.commit(row)
        self.extra = {key: value for key, value in inner.state.items() if key not in stand_ins}
        return loss

    def _encoded(
        self, piece: Piece, stand_in: Tensor, state: Mapping[str, Any], old: Record | None
    ) -> Record:
        coded = old is not None and any(isinstance(value, Coded) for value in old.values())
        if old is not None and coded and piece.param.grad is None:
            # it was not stepped, so it is not rounded again
            return old
        record = self.encode(piece, stand_in, state)
        found_inf = getattr(self.inner, "found_inf", None)
        return select(found_inf, old, record) if coded and old and found_inf is not None else record

    def encode(self, piece: Piece, stand_in: Tensor, state: Mapping[str, Any]) -> Record:
        """The record of a state as the policy wants it after this step."""
        if not state:
            return {}
        formats = self._formats(piece.param, state)
        if not formats:
            return dict(state)
        counter = Counter(self.seed, self.steps + 1, piece.number, piece.start)
        return encode_state(state, stand_in, formats, counter)

    def _formats(self, param: Tensor, state: Mapping[str, Any]) -> dict[str, Format]:
        """The formats that the policy wants after this step, by key."""
        formats = {}
        for key, codec in self.policy.get_codecs(param, state, self.steps).items():
            format = as_codec(codec).stored
            if format is not None and param.numel() >= format.min_elements:
                formats[key] = format
        return formats

    def pieces_of(self, param: Tensor) -> list[Piece]:
        """The pieces that a parameter is stepped in.

        Raises:
            KeyError: it is not the optimizer's.
        """
        found = [piece for piece in self.plan() if piece.param is param]
        if not found:
            raise KeyError(
                f"param of shape {tuple(param.shape)}: not a parameter of this optimizer"
            )
        return found

    def kept_pieces(self, param: Tensor) -> list[Piece]:
        """The pieces that a parameter's records are of."""
        return pieces_like(param, [length(record) for record in self.store.kept(param)])

    def states(self, param: Tensor, of: Sequence[Piece]) -> dict[str, Any]:
        """The whole decoded state of one parameter, which is stored in the pieces ``of``."""
        return joined([decode_state(r or {}, param) for r in self.store.load(of)], of)

    def put(self, param: Tensor, plan: Sequence[Piece], state: Mapping[str, Any]) -> None:
        """Keep a whole state, encoded as the policy wants it now."""
        records = [self.encode(piece, piece.data(), cut(state, piece)) for piece in plan]
        self.store.save([param], [records])

    def _recut(self, plan: Sequence[Piece]) -> None:
        """Cut anew what was stored when tensors were split elsewhere."""
        for place, piece in enumerate(plan):
            if piece.part or piece.param not in self.store:
                continue
            kept = self.store.peek(piece.param)
            if len(kept) != piece.parts or (piece.parts > 1 and length(kept[0]) != piece.stop):
                state = self.states(piece.param, self.kept_pieces(piece.param))
                self.put(piece.param, plan[place : place + piece.parts], state)

    def _failed(
        self,
        error: Exception,
        plan: Sequence[Piece],
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


def pieces_like(param: Tensor, lengths: Sequence[int]) -> list[Piece]:
    """Pieces of a parameter that have ``lengths``; whose places in the optimizer do not matter."""
    if len(lengths) == 1:
        return [Piece(param, 0, 0, 0, param.numel())]
    starts = [0, *accumulate(lengths)]
    return [
        Piece(param, 0, 0, start, start + count, part, len(lengths))
        for part, (start, count) in enumerate(zip(starts, lengths, strict=False))
    ]


def length(record: Record) -> int:
    """Elements of the part that a record is of."""
    for value in record.values():
        if isinstance(value, Coded):
            return value.numel
        tensor = getattr(value, "tensor", value)
        if isinstance(tensor, Tensor) and tensor.dim():
            return tensor.numel()
    return 0
