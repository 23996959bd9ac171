"""The engine as an optimizer holds it: chooses the backend and keeps plans between steps."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, Protocol

from optstate_codecs.engine import eager
from optstate_codecs.engine.capture import capturing, needs_warm_up
from optstate_codecs.engine.cpu import compiled
from optstate_codecs.engine.cpu.build import CannotBuild, compiler
from optstate_codecs.engine.request import ParamStep, StepRequest, layout_of
from optstate_codecs.engine.triton.buckets import Bucket, build_buckets
from optstate_codecs.engine.triton.step_tables import RowTable
from optstate_codecs.triton_lib import BACKEND_VARIABLE, HAS_TRITON, INTERPRETED

__all__ = ["BACKENDS", "Executor", "ResidentExecutor"]

BACKENDS = ("auto", "eager", "compile", "triton")
# plans are keyed by which parameters have gradients; models that route keep a few, and those that
# step in parts as many as cover this many whole ones
PLANS = 8
# building loops takes a second or two, which 2^20 elements win back in about a hundred steps
WORTH_BUILDING = 1 << 20


@dataclass
class Plan:
    """What is kept for one set of units: its buckets, and what they were built from."""

    param_steps: list[ParamStep]
    layouts: list[Any]
    aligned: list[bool]
    addresses: list[int]
    functions: list[Any]
    buckets: list[Bucket]
    left: list[int]
    tables: list[RowTable]
    constants: dict[int, dict[str, Any]]
    mean_starts: Sequence[int]

    def holds(self, request: StepRequest, functions: list[Any]) -> bool:
        """Whether every table still says where things are."""
        if self.functions != functions or not all(map(is_, self.param_steps, request.param_steps)):
            return False
        if self.mean_starts != (request.grad_means.starts if request.grad_means else ()):
            return False
        if self.layouts != _layouts(request):
            return False
        if self.addresses != request.addresses:
            if self.aligned != _aligned(request):
                return False
            self.addresses = list(request.addresses)
        return True


def _layouts(request: StepRequest) -> list[Any]:
    """What a plan depends on in the gradients, besides where they are in memory."""
    return list(request.layouts or map(layout_of, request.grads))


def _aligned(request: StepRequest) -> list[bool]:
    """Which gradients begin where a thread may access 16 bytes at once."""
    return [address % 16 == 0 for address in request.addresses]


class Executor(Protocol):
    """Runs step requests for an optimizer, with resident or with offloaded state."""

    def step(self, request: StepRequest) -> None:
        """Step every parameter of the request."""

    def join(self) -> None:
        """Have the current stream wait for partial steps."""

    def finish(self, complete: bool = True) -> None:
        """A step is over: complete, or broken off by an exception."""

    def supersede(self) -> None:
        """State and group values are about to be replaced."""

    def synchronize(self) -> None:
        """Wait until all state is stored where ``optimizer.state`` shows it."""


class ResidentExecutor:
    """Runs jobs on one backend and remembers their plans.

    Args:
        backend: "auto" takes Triton on CUDA devices where it is installed; on a CPU compiled
            loops, from 2^20 elements on and where there is a C++ compiler; and the reference
            elsewhere. The environment variable OPTSTATE_BACKEND stands in for "auto".

    Raises:
        RuntimeError: "triton" or "compile" was asked for by name and cannot run here.
    """

    def __init__(self, backend: str) -> None:
        if backend == "auto":
            backend = os.environ.get(BACKEND_VARIABLE, "auto")
            if backend not in BACKENDS:
                allowed = ", ".join(map(repr, BACKENDS))
                raise ValueError(f"{BACKEND_VARIABLE}={backend!r}: must be one of {allowed}")
        if backend == "triton" and not HAS_TRITON:
            raise RuntimeError("backend='triton': triton is not installed; pip install triton")
        if backend == "compile":
            self._with_compiler(compiler)
        self.backend = backend
        self._plans: OrderedDict[tuple[int, ...], Plan] = OrderedDict()
        # a graph reads the tables of its plan as long as it is replayed
        self._captured: list[Plan] = []

    def step(self, request: StepRequest) -> None:
        """Step every unit of the job."""
        if not request.param_steps:
            return
        try:
            self._run(request)
        except BaseException:
            request.uncount()
            raise

    def join(self) -> None:
        """Have the current stream wait for steps that were taken apart, of which there are none."""

    def finish(self, complete: bool = True) -> None:
        """A step has been taken, ``complete`` or broken off; nothing is under way here."""

    def supersede(self) -> None:
        """State and groups' values are about to be replaced; nothing of them is kept here."""

    def synchronize(self) -> None:
        """Have all state where it is shown, which here it always is."""

    def _run(self, request: StepRequest) -> None:
        if self._kernel_runs(request):
            self._launch(self._plan(request), request)
            return
        if self._skipped(request):
            return
        # of the whole job, however it is staged: its bits are not to depend on that
        total = request.total or sum(param_step.param.numel() for param_step in request.param_steps)
        for stage, part in request.stages():
            with request.around(stage):
                if not self._loops_run(part, total >= WORTH_BUILDING):
                    eager.step(part)

    @staticmethod
    def _skipped(request: StepRequest) -> bool:
        return (
            request.staging is not None
            and request.found_inf is not None
            and bool(request.found_inf)
        )

    def _kernel_runs(self, request: StepRequest) -> bool:
        cuda = all(param_step.param.is_cuda for param_step in request.param_steps)
        if self.backend == "triton" and not (cuda or INTERPRETED):
            raise RuntimeError(
                "backend='triton': parameters must be on a CUDA device "
                "(or TRITON_INTERPRET=1 set); use backend='auto'"
            )
        return self.backend == "triton" or (self.backend == "auto" and cuda and HAS_TRITON)

    def _loops_run(self, request: StepRequest, large: bool) -> bool:
        """Step the job by compiled loops, if that is asked for or worth it and possible."""
        if self.backend not in ("auto", "compile"):
            return False
        on_cpu = all(param_step.param.device.type == "cpu" for param_step in request.param_steps)
        if self.backend == "compile":
            if not on_cpu:
                raise RuntimeError(
                    "backend='compile': parameters must be on the CPU; use backend='auto'"
                )
            self._with_compiler(lambda: compiled.step(request))
            return True
        if not (on_cpu and large):
            return False
        return compiled.try_step(request)

    @staticmethod
    def _with_compiler(action: Callable[[], Any]) -> None:
        try:
            action()
        except CannotBuild as error:
            raise RuntimeError(
                f"backend='compile': needs a working C++ compiler ({error}); install g++ or "
                "clang++, name one in the environment variable CXX, or use backend='eager'"
            ) from error

    def _plan(self, request: StepRequest) -> Plan:
        key = tuple([param_step.index for param_step in request.param_steps])
        functions = [request.rule.device_function(hyper) for hyper in request.hypers]
        plan = self._plans.get(key)
        if plan is None or not plan.holds(request, functions):
            if capturing():
                raise needs_warm_up("no step yet had just these gradients, laid out like these")
            # kernels are imported with the first plan, so that CPU users never load triton
            from optstate_codecs.engine.triton.launch import constants

            buckets, left = build_buckets(request)
            plan = self._plans[key] = Plan(
                param_steps=list(request.param_steps),
                layouts=_layouts(request),
                aligned=_aligned(request),
                addresses=list(request.addresses),
                functions=functions,
                buckets=buckets,
                left=left,
                tables=_tables(buckets),
                constants={id(bucket): constants(bucket) for bucket in buckets},
                mean_starts=request.grad_means.starts if request.grad_means else (),
            )
            self._plans.move_to_end(key)
            most = PLANS * len(set[int]().union(*self._plans))
            while len(self._plans) > PLANS and sum(map(len, self._plans)) > most:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan

    def _launch(self, plan: Plan, request: StepRequest) -> None:
        from optstate_codecs.engine.triton.launch import launch

        if capturing() and plan.buckets and not any(plan is kept for kept in self._captured):
            if any(table.on_host for table in plan.tables):
                raise needs_warm_up("step counts are on the host, since capturable was False")
            self._captured.append(plan)
        busy = request.staging is not None
        launches: dict[int, list[tuple[Bucket, tuple[Any, ...]]]] = {}
        for table in plan.tables:
            factor, found_inf = table.beside(request.factor), table.beside(request.found_inf)
            if not table.advance(found_inf, request.draw is not None):
                continue  # nothing of it is launched
            grads = table.addresses(plan.addresses, busy)
            rows = table.values(request.rule, request.hypers, request.draw, busy)
            for bucket, start, stop in table.buckets:
                scalars = (grads[start:stop], table.row_of[start:stop], rows)
                means = (
                    request.grad_means.values.get(bucket.tensors.device)
                    if request.grad_means
                    else None
                )
                given = (*scalars, means, factor, found_inf)
                launches.setdefault(bucket.stage, []).append((bucket, given))
                request.counted += bucket.param_steps
        left = dict(request.part(plan.left).stages()) if plan.left else {}
        for stage in sorted({*launches, *left}):
            with request.around(stage):
                if stage in left:
                    eager.step(left[stage])
                for bucket, given in launches.get(stage, ()):
                    launch(bucket, plan.constants[id(bucket)], *given)
                    request.done += bucket.param_steps


def _tables(buckets: list[Bucket]) -> list[RowTable]:
    """One table for all buckets whose parameters, and whose step counts, share a device."""
    together: dict[Any, list[Bucket]] = {}
    for bucket in buckets:
        param_step = bucket.param_steps[0]
        devices = (param_step.param.device, param_step.state["step"].device)
        together.setdefault(devices, []).append(bucket)
    return [RowTable(members) for members in together.values()]
