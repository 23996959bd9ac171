"""The fused step: the engine of ``optstate_codecs`` steps state without decoding it to memory.

It steps a parameter if the inner optimizer follows a rule of ``optstate_codecs`` and the state is
stored in its formats and stays in them. Decode, step and encode are then one launch on a GPU, or
compiled loops on a CPU. It draws the same random numbers as the step through the inner optimizer.
Results differ only by the rounding of float32, which may change a code that is near a border.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate_codecs.engine import ParamStep, ResidentExecutor, StepRequest, trainable
from optstate_codecs.engine.triton.buckets import takes
from optstate_codecs.formats import Format
from optstate_codecs.gradients.grad_norm import gradient_factor
from optstate_codecs.offloading import StreamingExecutor
from optstate_codecs.rules import Adam, Moment, Rule
from optstate_wrap.state.param_chunks import ParamChunk
from optstate_wrap.state.record import Coded, Record
from optstate_wrap.state.store import Store
from optstate_wrap.step.param_steps import (
    make_param_step,
    rule_of,
    same_bits,
    same_order,
    stored_formats,
    update_record,
)

__all__ = ["FusedStep", "KeysOnly", "ValueAccess"]

HALF = (torch.bfloat16, torch.float16)


@dataclass(eq=False)
class _Prepared:
    """The ``ParamStep`` objects of a parameter, and the values that they were made from."""

    param_steps: list[ParamStep]
    records: Sequence[Record]
    values: list[Any]
    memory: tuple[Any, ...]
    formats: Mapping[str, Format]
    moments: tuple[Moment, ...]


class ValueAccess(LookupError):
    """A policy read a value of a state that is not decoded."""


class KeysOnly(Mapping[str, Any]):
    """The keys of a state, for policies that need no values; reading one raises."""

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


class FusedStep:
    """Chooses the parameters that the codecs' engine steps, and steps them.

    Args:
        wanted: None steps float32 parameters only; True also bfloat16 and float16 ones, in float32
            arithmetic, which is finer than the inner optimizer's own; False steps none.
        seed: keys every random number.
        store: holds the records, on the device or on the host.

    Attributes:
        done: the ``ParamStep`` objects that the latest step has stepped.
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
        """Drop the references to all records, with the executor."""
        self._executor = None
        self.store.synchronize = None
        self._prepared: dict[Tensor, _Prepared] = {}
        self._owners: dict[int, tuple[_Prepared, Record]] = {}
        self.done: list[ParamStep] = []

    def _get_executor(self) -> ResidentExecutor | StreamingExecutor:
        """The executor, which the first step makes."""
        if self._executor is None:
            self._executor = self.store.make_executor()
            if isinstance(self._executor, StreamingExecutor):
                self._executor.placement.watch = self._on_state_moved
                self.store.synchronize = self._executor.synchronize
        return self._executor

    def _on_state_moved(self, param_step: ParamStep) -> None:
        """Update the record of a ``ParamStep`` whose state has moved to other tensors."""
        if id(param_step) in self._owners:
            prepared, record = self._owners[id(param_step)]
            update_record(param_step, record)
            self.store.discard([record])
            prepared.values = [value for r in prepared.records for value in r.values()]

    def release(self, param: Tensor) -> None:
        """Stop stepping a parameter here; its records then hold its latest state."""
        prepared = self._prepared.pop(param, None)
        if prepared is not None:
            if isinstance(self._executor, StreamingExecutor):
                self._executor.placement.release(prepared.param_steps)
            for param_step in prepared.param_steps:
                del self._owners[id(param_step)]

    def start_step(self, inner: Optimizer) -> bool:
        """Read the hyper-parameters for a step; False if the engine cannot take this step."""
        self._rule = rule = None if self.wanted is False else rule_of(inner)
        self._exact = isinstance(self._get_executor(), StreamingExecutor) and (
            self.wanted or same_bits(inner)
        )
        if rule is not None:
            try:
                self._hypers = [rule.hyper({**rule.defaults(), **g}) for g in inner.param_groups]
                return True
            except (TypeError, ValueError):
                pass  # the inner optimizer may accept other hyper-parameters
        for param in list(self._prepared):
            self.release(param)
        return False

    def may_take(self, records: Sequence[Record]) -> bool:
        """Whether the engine steps state like that in ``records`` at all."""
        return self._exact or any(
            isinstance(value, Coded) for record in records for value in record.values()
        )

    def param_steps_for(
        self, chunks: Sequence[ParamChunk], records: Sequence[Record], formats: Mapping[str, Format]
    ) -> list[ParamStep]:
        """A ``ParamStep`` for each chunk of a parameter; empty if the engine does not step it.

        Args:
            chunks: all chunks of the parameter, which has a gradient.
            records: one for each chunk.
            formats: wanted after the step, by state key.
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
        # the inner optimizer makes new records; references would keep the old ones in memory
        self.release(param)
        if param_steps:
            self.store.wait()
            prepared = _Prepared(param_steps, records, values, memory, dict(formats), moments)
            self._prepared[param] = prepared
            self._owners |= {
                id(s): (prepared, r) for s, r in zip(param_steps, records, strict=True)
            }
        return param_steps

    def _param_steps(
        self,
        chunks: Sequence[ParamChunk],
        records: Sequence[Record],
        formats: Mapping[str, Format],
        moments: tuple[Moment, ...],
    ) -> list[ParamStep]:
        """New ``ParamStep`` objects, or none if one of the chunks cannot be stepped."""
        param, grad = chunks[0].param, chunks[0].param.grad
        dtypes = (torch.float32, *HALF) if self.wanted else (torch.float32,)
        plain = type(param) in (Tensor, Parameter) and type(grad) is Tensor
        # a parameter that is listed several times is stepped by the inner optimizer
        if not (plain and chunks[0].times == 1 and param.dtype in dtypes and _dense(grad)):
            return []
        names, counted = [moment.name for moment in moments], isinstance(self._rule, Adam)
        param_steps = []
        for chunk, record in zip(chunks, records, strict=True):
            stored = stored_formats(record, names, formats, counted, self._exact)
            if stored is None or not (chunk.parts > 1 or same_order(record, param)):
                return []
            param_step = make_param_step(chunk, record, moments, stored, self.seed)
            # on a GPU, the engine is not faster without its kernel
            if param.device.type != "cpu" and not takes(param_step, chunk.gradient()):
                return []
            param_steps.append(param_step)
        return param_steps

    def step(
        self,
        inner: Optimizer,
        param_steps: Sequence[ParamStep],
        chunks: Sequence[ParamChunk],
        draw: int,
        last: bool,
    ) -> None:
        """Step ``param_steps``, one for each of ``chunks``, and set ``done``.

        If it raises, those that are not in ``done`` are unchanged.

        Args:
            inner: gives the groups, ``grad_scale`` and ``found_inf``.
            param_steps: as ``param_steps_for`` returned them.
            chunks: of the parameters.
            draw: the number of the step, which keys random numbers.
            last: whether no more parts of the same step follow.
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
        # if the host skips the step because of ``found_inf``, all of them are complete too
        self.done = list(param_steps)

    def finish(self, complete: bool = True) -> None:
        """End a step, which is ``complete`` or has failed."""
        if self._executor is not None:
            self._executor.finish(complete)

    def join(self) -> None:
        """Make the current stream wait for everything that was stepped."""
        if self._executor is not None:
            self._executor.join()

    def __getstate__(self) -> dict[str, Any]:
        return {"wanted": self.wanted, "seed": self.seed, "store": self.store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _dense(grad: Tensor | None) -> bool:
    """Whether a gradient is strided; a sparse one is left to the inner optimizer."""
    return grad is not None and grad.layout is torch.strided


def _memory_key(param: Tensor) -> tuple[Any, ...]:
    """The address, dtype, device and layout of a parameter, which ``.data`` may change."""
    return param.data_ptr(), param.dtype, param.device, param.shape, param.stride()
