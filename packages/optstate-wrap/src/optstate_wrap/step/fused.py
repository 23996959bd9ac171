"""Steps coded state without decoding it to memory, by the codecs' own engine.

Where the inner optimizer's mathematics is one of the rules of ``optstate_codecs`` and a parameter's
state is stored in its formats, and is to stay so, decode, step and encode are one: one launch on a
GPU, compiled loops on a CPU. Random numbers are those of the way through the inner optimizer, so
results are the same but for the rounding of float32, which may move a code where it falls on a
border.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate_codecs.engine import ParamStep, ResidentExecutor, StepRequest, trainable
from optstate_codecs.engine.triton.buckets import takes
from optstate_codecs.formats import FP32, Format
from optstate_codecs.gradients.grad_norm import gradient_factor
from optstate_codecs.offloading import StreamingExecutor
from optstate_codecs.rules import SGD, Adam, Moment, Rule
from optstate_codecs.state.layout import inverse_order
from optstate_codecs.writes import parameter_write
from optstate_wrap.state.param_chunks import Layout, ParamChunk
from optstate_wrap.state.record import Coded, OffloadedTensor, Record
from optstate_wrap.state.store import Store

__all__ = ["Fused", "KeysOnly", "ValueAccess", "rule_of"]

HALF = (torch.bfloat16, torch.float16)


def rule_of(inner: Optimizer) -> Rule | None:
    """The rule that ``inner`` follows in all of its groups, if it is one of ours."""
    groups = inner.param_groups
    if any(group.get("differentiable") for group in groups):
        return None
    if type(inner) is torch.optim.SGD:
        return SGD()
    if type(inner) in (torch.optim.Adam, torch.optim.AdamW):
        usual = type(inner) is torch.optim.AdamW
        kinds = {bool(group.get("decoupled_weight_decay", usual)) for group in groups}
        return Adam(decoupled=kinds.pop()) if len(kinds) == 1 else None
    return None


def _same_bits(inner: Optimizer) -> bool:
    """Whether the engine steps exact state to the very bits that ``inner`` would.

    The kernel's square roots are off in the last bit here and there, and so are sums in torch's
    fused and capturable steps.
    """
    groups = inner.param_groups
    rooted = type(inner) is not torch.optim.SGD
    cuda = any(param.is_cuda for group in groups for param in group["params"])
    flagged = any(group.get(flag) for group in groups for flag in ("fused", "capturable"))
    return not flagged and not (rooted and cuda)


@dataclass(eq=False)
class _Prepared:
    """The chunks of a parameter as the engine steps them, and what that was made from."""

    param_steps: list[ParamStep]
    records: Sequence[Record]
    values: list[Any]
    memory: tuple[Any, ...]
    formats: Mapping[str, Format]
    moments: tuple[Moment, ...]


class ValueAccess(LookupError):
    """Somebody wanted a number that is not decoded."""


class KeysOnly(Mapping[str, Any]):
    """The keys of a state, for policies that need no more; a look at a value raises."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def __getitem__(self, key: str) -> Any:
        raise ValueAccess(key)

    def __contains__(self, key: object) -> bool:
        return key in self._record

    def __iter__(self) -> Iterator[str]:
        return iter(self._record)

    def __len__(self) -> int:
        return len(self._record)


class Fused:
    """The engine, and the chunks that it has stepped.

    Args:
        wanted: None takes float32 parameters only; True also bfloat16 and float16 ones, in float32
            arithmetic, which is finer than the inner optimizer's own; False takes none.
        seed: keys every random number.
        store: keeps the records, beside the parameters or on the host.
    """

    def __init__(self, wanted: bool | None, seed: int, store: Store) -> None:
        self.wanted = wanted
        self.seed = seed
        self.store = store
        self._executor: ResidentExecutor | StreamingExecutor | None = None
        self._rule: Rule | None = None
        self._hypers: list[Any] = []
        self._exact = False
        self.forget()

    def forget(self) -> None:
        """Let go of all records."""
        self._executor = None
        self.store.synchronize = None
        self._prepared: dict[Tensor, _Prepared] = {}
        self._owners: dict[int, tuple[_Prepared, Record]] = {}
        self.done: list[ParamStep] = []

    def _get_executor(self) -> ResidentExecutor | StreamingExecutor:
        """The session, which is made with the first step."""
        if self._executor is None:
            self._executor = self.store.make_executor()
            if isinstance(self._executor, StreamingExecutor):
                self._executor.placement.watch = self._on_state_moved
                self.store.synchronize = self._executor.synchronize
        return self._executor

    def _on_state_moved(self, param_step: ParamStep) -> None:
        """The state of a unit is in other tensors now: its record takes these."""
        if id(param_step) in self._owners:
            prepared, record = self._owners[id(param_step)]
            _update_record(param_step, record)
            self.store.discard([record])
            prepared.values = [value for r in prepared.records for value in r.values()]

    def release(self, param: Tensor) -> None:
        """Have the engine step a parameter no more; its records show its state."""
        prepared = self._prepared.pop(param, None)
        if prepared is not None:
            if isinstance(self._executor, StreamingExecutor):
                self._executor.placement.release(prepared.param_steps)
            for param_step in prepared.param_steps:
                del self._owners[id(param_step)]

    def start_step(self, inner: Optimizer) -> bool:
        """Take up the hyper-parameters of a step; whether there is something to do for this."""
        self._rule = rule = None if self.wanted is False else rule_of(inner)
        self._exact = isinstance(self._get_executor(), StreamingExecutor) and (
            self.wanted or _same_bits(inner)
        )
        if rule is not None:
            try:
                self._hypers = [rule.hyper({**rule.defaults(), **g}) for g in inner.param_groups]
                return True
            except (TypeError, ValueError):
                pass  # what is no hyper-parameter here may be one there
        for param in list(self._prepared):
            self.release(param)
        return False

    def param_steps_for(
        self, chunks: Sequence[ParamChunk], records: Sequence[Record], formats: Mapping[str, Format]
    ) -> list[ParamStep]:
        """All chunks of one parameter as units, or none.

        Args:
            chunks: of the parameter, which has a gradient.
            records: of the chunks, beside the parameter.
            formats: that its state is to have after the step, by key.
        """
        rule, param = self._rule, chunks[0].param
        assert rule is not None
        moments = rule.moments(self._hypers[chunks[0].group])
        values = [value for record in records for value in record.values()]
        prepared, memory = self._prepared.get(param), _memory_key(param)
        if (
            prepared is not None
            and _dense(param.grad)
            and prepared.memory == memory
            and len(prepared.values) == len(values)
            and all(map(is_, prepared.values, values))
            and prepared.formats == formats
            and prepared.moments == moments
            and not any(param_step.moved() for param_step in prepared.param_steps)
        ):
            return prepared.param_steps
        param_steps = self._param_steps(chunks, records, formats, moments)
        # what is not stepped here gets new records, and the old ones must not stay for this
        self.release(param)
        if param_steps:
            self.store.wait()
            prepared = _Prepared(param_steps, records, values, memory, dict(formats), moments)
            self._prepared[param] = prepared
            self._owners |= {
                id(u): (prepared, r) for u, r in zip(param_steps, records, strict=True)
            }
        return param_steps

    def _param_steps(
        self,
        chunks: Sequence[ParamChunk],
        records: Sequence[Record],
        formats: Mapping[str, Format],
        moments: tuple[Moment, ...],
    ) -> list[ParamStep]:
        param, grad = chunks[0].param, chunks[0].param.grad
        dtypes = (torch.float32, *HALF) if self.wanted else (torch.float32,)
        plain = type(param) in (Tensor, Parameter) and type(grad) is Tensor
        # what is there several times, the inner optimizer steps in its own way
        if not (plain and chunks[0].times == 1 and param.dtype in dtypes and _dense(grad)):
            return []
        names, counted = [moment.name for moment in moments], isinstance(self._rule, Adam)
        param_steps = []
        for chunk, record in zip(chunks, records, strict=True):
            stored = _stored(record, names, formats, counted, self._exact)
            if stored is None or not (chunk.parts > 1 or _same_memory_order(record, param)):
                return []
            param_step = self._param_step(chunk, record, moments, stored)
            # elsewhere than on a CPU, what the kernel does not take is no faster
            if param.device.type != "cpu" and not takes(param_step, chunk.gradient()):
                return []
            param_steps.append(param_step)
        return param_steps

    def _param_step(
        self,
        chunk: ParamChunk,
        record: Record,
        moments: tuple[Moment, ...],
        stored: dict[str, Format],
    ) -> ParamStep:
        param = chunk.data() if chunk.parts > 1 else chunk.param
        # where it is not kept, only whether a step is the first one counts: one made the record
        state: dict[str, Any] = {"step": record.get("step", None)}
        if state["step"] is None:
            state["step"] = torch.ones((), dtype=torch.float32, device="cpu")
        for name in stored:
            value = record[name]
            if isinstance(value, Coded):
                state |= _components(name, value)
            else:
                state[name] = value.tensor if isinstance(value, OffloadedTensor) else value
        write = parameter_write("nearest", param.dtype)
        places = (chunk.number, chunk.group, chunk.start)
        return ParamStep(param, state, moments, stored, write, self.seed, *places)

    def step(
        self,
        inner: Optimizer,
        param_steps: Sequence[ParamStep],
        chunks: Sequence[ParamChunk],
        draw: int,
        last: bool,
    ) -> None:
        """Step ``param_steps`` of ``chunks``; ``done`` is then those that have been stepped.

        ``last`` says whether more of the same step is to come.

        Where it raises, the others are as they were.
        """
        self.done = []
        assert self._rule is not None
        grads = [chunk.gradient() for chunk in chunks]
        scale = getattr(inner, "grad_scale", None)
        request = StepRequest(
            self._rule,
            param_steps,
            grads,
            self._hypers,
            addresses=[grad.data_ptr() for grad in grads],
            factor=gradient_factor(grads, scale, None)[0],
            found_inf=getattr(inner, "found_inf", None),
            draw=draw,
            total=trainable(inner.param_groups),
        )
        self.done = request.done
        request.asynchronous = not last
        self._get_executor().step(request)
        # where the host skips a step, all are as they should be
        self.done = list(param_steps)

    def finish(self, complete: bool = True) -> None:
        """A step has been taken, or has been broken off."""
        if self._executor is not None:
            self._executor.finish(complete)

    def join(self) -> None:
        """Have the current stream wait for all that has been stepped."""
        if self._executor is not None:
            self._executor.join()

    def __getstate__(self) -> dict[str, Any]:
        return {"wanted": self.wanted, "seed": self.seed, "store": self.store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _dense(grad: Tensor | None) -> bool:
    """Whether a gradient has an address; the inner optimizer takes or refuses a sparse one."""
    return grad is not None and grad.layout is torch.strided


def _memory_key(param: Tensor) -> tuple[Any, ...]:
    """Where and as what a parameter lies in memory, which ``.data`` may change."""
    return param.data_ptr(), param.dtype, param.device, param.shape, param.stride()


def _same_memory_order(record: Record, param: Tensor) -> bool:
    """Whether what is stored lies in the order of the parameter's dimensions in memory."""
    now = Layout.of(param)
    for value in record.values():
        if isinstance(value, Coded):
            if (value.shape, value.order) != (now.shape, now.order):
                return False
            continue
        tensor = value.tensor if isinstance(value, OffloadedTensor) else value
        dims = tensor.dim() if isinstance(tensor, Tensor) else 0
        if dims and not tensor.permute(now.order).is_contiguous():
            return False
    return True


def _stored(
    record: Record, names: Sequence[str], formats: Mapping[str, Format], counted: bool, exact: bool
) -> dict[str, Format] | None:
    """The format of each moment as it is stored, if it is to stay so and all is as known.

    Where nothing is coded, only if ``exact``.
    """
    known = {*names, "step"} if counted else set(names)
    coded = any(isinstance(record.get(name), Coded) for name in names)
    if set(record) != known or not (coded or exact):
        return None
    if counted and not (isinstance(record["step"], Tensor) and record["step"].dim() == 0):
        return None
    roots = {value.root for value in record.values() if isinstance(value, Coded)}
    found: dict[str, Format] = {}
    for name in names:
        value, wanted = record[name], formats.get(name)
        if isinstance(value, Coded):
            along = wanted is None and name in roots and value.format == FP32()
            if not along and (wanted is None or replace(wanted, min_elements=0) != value.format):
                return None
            found[name] = value.format
        elif (
            isinstance(
                plain := value.tensor if isinstance(value, OffloadedTensor) else value, Tensor
            )
            and plain.dtype == torch.float32
            and wanted is None
        ):
            found[name] = FP32()
        else:
            return None
    return found


def _components(name: str, coded: Coded) -> dict[str, Tensor]:
    """The components of a moment as the engine has them: laid out as the parameter is."""
    ordered, inverse = [coded.shape[d] for d in coded.order], inverse_order(coded.order)
    return {
        component.key(name): part.view(ordered).permute(inverse)
        if component.per_element
        else part.view(component.shape(coded.shape))
        for part, component in zip(coded.parts, coded.bound.components, strict=True)
    }


def _update_record(param_step: ParamStep, record: Record) -> None:
    """Make the tensors of a unit's state those of its record."""
    for name in param_step.formats:
        value = record[name]
        if isinstance(value, Coded):
            flat = [
                param_step.state[c.key(name)].permute(value.order).view(-1)
                if c.per_element
                else param_step.state[c.key(name)].view(-1)
                for c in value.bound.components
            ]
            record[name] = replace(value, parts=tuple(flat))
        elif isinstance(value, OffloadedTensor):
            record[name] = replace(value, tensor=param_step.state[name])
        else:
            record[name] = param_step.state[name]
