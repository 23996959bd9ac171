"""Executors: the protocol an optimizer steps through, and the one for resident state."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, Protocol

from optstate_codecs.engine import eager
from optstate_codecs.engine.capture import capturing, needs_warm_up
from optstate_codecs.engine.cpu.build import CannotBuild, compiler
from optstate_codecs.engine.cpu.compiled import CompiledSteps
from optstate_codecs.engine.request import ParamStep, StepRequest, layout_of
from optstate_codecs.engine.triton.buckets import Bucket, build_buckets
from optstate_codecs.engine.triton.step_tables import StepTable
from optstate_codecs.errors import StepError
from optstate_codecs.triton_lib import BACKEND_VARIABLE, HAS_TRITON, INTERPRETED

__all__ = ["BACKENDS", "Executor", "ResidentExecutor"]

BACKENDS = ("auto", "eager", "compile", "triton")
# launch plans that are kept, one for each set of parameters that had gradients; of steps in parts,
# as many as cover this many whole steps
PLANS = 8


@dataclass
class LaunchPlan:
    """The launches that step one set of parameters, and the inputs they were built from.

    Attributes:
        aligned: which gradients begin at a multiple of 16 bytes.
        functions: the rule's device function for each group.
        fallback: positions of the parameters that the reference steps.
        launchers: each bucket's, by the bucket's id.
        mean_starts: ``GradMeans.starts``, empty without means.
    """

    param_steps: list[ParamStep]
    layouts: list[Any]
    aligned: list[bool]
    addresses: list[int]
    functions: list[Any]
    buckets: list[Bucket]
    fallback: list[int]
    tables: list[StepTable]
    launchers: dict[int, Any]
    mean_starts: Sequence[int]

    def steps_same(self, request: StepRequest) -> bool:
        """Whether the request steps the plan's parameters, in the same order."""
        mine, given = self.param_steps, request.param_steps
        return len(mine) == len(given) and all(map(is_, mine, given))

    def is_valid(self, request: StepRequest, functions: list[Any]) -> bool:
        """Whether the plan's tables fit this request too."""
        if self.functions != functions or not self.steps_same(request):
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
    """Dtype, shape and strides of every gradient."""
    return list(request.layouts or map(layout_of, request.grads))


def _aligned(request: StepRequest) -> list[bool]:
    """Which gradients begin at a multiple of 16 bytes, so that a thread may access 16 at once."""
    return [address % 16 == 0 for address in request.addresses]


class Executor(Protocol):
    """Runs step requests for an optimizer, with resident or with offloaded state."""

    def step(self, request: StepRequest) -> None:
        """Step every parameter of the request."""

    def join(self) -> None:
        """Make the current stream wait for asynchronous steps."""

    def finish(self, complete: bool = True) -> None:
        """Called after a step; ``complete`` is False where an exception ended it."""

    def supersede(self) -> None:
        """Called before state and group values are replaced."""

    def synchronize(self) -> None:
        """Wait until all state is stored where ``optimizer.state`` shows it."""


class ResidentExecutor:
    """Runs step requests on one backend and keeps their launch plans.

    Args:
        backend: "auto" takes Triton on CUDA devices where it is installed; compiled kernels on a
            CPU, once they are built or worth it (see ``engine.cpu.choice``), where there is a C++
            compiler; and the reference elsewhere. The environment variable OPTSTATE_BACKEND
            replaces "auto".

    Raises:
        ValueError: OPTSTATE_BACKEND is no backend.
        RuntimeError: "triton" or "compile" was requested by name and cannot run here.
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
        self.compiled = CompiledSteps(required=backend == "compile")
        self._plans: OrderedDict[tuple[int, ...], LaunchPlan] = OrderedDict()
        # of the latest launch; most steps take the same parameters again
        self._latest: LaunchPlan | None = None
        # kept alive, since replays of a graph read the tables of its plan
        self._captured: list[LaunchPlan] = []

    def step(self, request: StepRequest) -> None:
        """Step every parameter of the request.

        Raises:
            StepError: raised from the error of a step that failed after the first parameter.
        """
        try:
            self.run(request)
        except Exception as error:
            if not (request.done or request.torn):
                raise
            done, torn = set(map(id, request.done)), set(map(id, request.torn))
            begun = done | torn
            raise StepError.of(
                error,
                "",
                [one.index for one in request.param_steps if id(one) in done],
                [one.index for one in request.param_steps if id(one) not in begun],
                [one.index for one in request.param_steps if id(one) in torn],
            ) from error

    def run(self, request: StepRequest) -> None:
        """Step every parameter; an error is raised as it is, with ``request.done`` valid."""
        if not request.param_steps:
            return
        try:
            self._run(request)
        except BaseException:
            request.uncount()
            raise

    def join(self) -> None:
        """Do nothing: no step is asynchronous here."""

    def finish(self, complete: bool = True) -> None:
        """Do nothing: no work goes on after a step here."""

    def supersede(self) -> None:
        """Do nothing: the executor keeps no copy of state or group values."""

    def synchronize(self) -> None:
        """Do nothing: resident state is always where ``optimizer.state`` shows it."""

    def _run(self, request: StepRequest) -> None:
        latest = self._latest
        if (latest is not None and latest.steps_same(request)) or self._uses_triton(request):
            self._launch(self._plan(request), request)
            return
        if self._skipped(request):
            return
        if not request.total:
            # so that no stage chooses otherwise than the whole step
            request.total = sum(param_step.param.numel() for param_step in request.param_steps)
        run = self._run_compiled if self._uses_compiled(request) else eager.step
        for stage, part in request.stages():
            with request.around(stage):
                run(part)

    @staticmethod
    def _skipped(request: StepRequest) -> bool:
        found_inf = request.found_inf
        return request.staging is not None and found_inf is not None and bool(found_inf)

    def _uses_triton(self, request: StepRequest) -> bool:
        cuda = all(param_step.param.is_cuda for param_step in request.param_steps)
        if self.backend == "triton" and not (cuda or INTERPRETED):
            raise RuntimeError(
                "backend='triton': parameters must be on a CUDA device "
                "(or TRITON_INTERPRET=1 set); use backend='auto'"
            )
        return self.backend == "triton" or (self.backend == "auto" and cuda and HAS_TRITON)

    def _uses_compiled(self, request: StepRequest) -> bool:
        """Whether compiled kernels may take the step."""
        if self.backend not in ("auto", "compile"):
            return False
        on_cpu = all(param_step.param.device.type == "cpu" for param_step in request.param_steps)
        if self.backend == "compile" and not on_cpu:
            raise RuntimeError(
                "backend='compile': parameters must be on the CPU; use backend='auto'"
            )
        # a graph does not record what they do; the reference raises
        return on_cpu and not capturing()

    def _run_compiled(self, request: StepRequest) -> None:
        self._with_compiler(lambda: self.compiled.step(request))

    @staticmethod
    def _with_compiler(action: Callable[[], Any]) -> None:
        try:
            action()
        except CannotBuild as error:
            raise RuntimeError(
                f"backend='compile': needs a working C++ compiler ({error}); install g++ or "
                "clang++, name one in the environment variable CXX, or use backend='eager'"
            ) from error

    def _plan(self, request: StepRequest) -> LaunchPlan:
        functions = [request.rule.device_function(hyper) for hyper in request.hypers]
        if self._latest is not None and self._latest.is_valid(request, functions):
            return self._latest
        key = tuple([param_step.index for param_step in request.param_steps])
        plan = self._plans.get(key)
        if plan is None or not plan.is_valid(request, functions):
            if capturing():
                raise needs_warm_up("no step yet had exactly these gradients in these layouts")
            # imported with the first plan, so that CPU users never import the kernels
            from optstate_codecs.engine.triton.launch import make_launcher

            buckets, fallback = build_buckets(request)
            plan = self._plans[key] = LaunchPlan(
                param_steps=list(request.param_steps),
                layouts=_layouts(request),
                aligned=_aligned(request),
                addresses=list(request.addresses),
                functions=functions,
                buckets=buckets,
                fallback=fallback,
                tables=_tables(buckets),
                launchers={id(bucket): make_launcher(bucket) for bucket in buckets},
                mean_starts=request.grad_means.starts if request.grad_means else (),
            )
            self._plans.move_to_end(key)
            most = PLANS * len(set[int]().union(*self._plans))
            while len(self._plans) > PLANS and sum(map(len, self._plans)) > most:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        self._latest = plan
        return plan

    def _launch(self, plan: LaunchPlan, request: StepRequest) -> None:
        from optstate_codecs.engine.triton.launch import launch

        if capturing() and plan.buckets and not any(plan is kept for kept in self._captured):
            if any(table.on_host for table in plan.tables):
                raise needs_warm_up("step counts are on the host, since capturable was False")
            self._captured.append(plan)
        avoid_copies = request.staging is not None
        means = request.grad_means.values if request.grad_means else {}
        launches: dict[int, list[tuple[Bucket, tuple[Any, ...]]]] = {}
        for table in plan.tables:
            factor, found_inf = table.to_device(request.factor), table.to_device(request.found_inf)
            if not table.advance(found_inf, request.draw is not None):
                continue  # the whole table's step is skipped
            grads = table.addresses(plan.addresses, avoid_copies)
            scalars = table.scalars(request.rule, request.hypers, request.draw, avoid_copies)
            for bucket, start, stop in table.buckets:
                tables = grads[start:stop], table.scalar_set[start:stop], scalars
                args = (*tables, means.get(bucket.tensors.device), factor, found_inf)
                launches.setdefault(bucket.stage, []).append((bucket, args))
                request.counted += bucket.param_steps
        fallback = dict(request.part(plan.fallback).stages()) if plan.fallback else {}
        for stage in sorted({*launches, *fallback}):
            with request.around(stage):
                if stage in fallback:
                    eager.step(fallback[stage])
                for bucket, args in launches.get(stage, ()):
                    launch(plan.launchers[id(bucket)], bucket, *args)
                    request.done += bucket.param_steps


def _tables(buckets: list[Bucket]) -> list[StepTable]:
    """One table for all buckets whose parameters, and whose step counts, share a device."""
    members: dict[Any, list[Bucket]] = {}
    for bucket in buckets:
        param_step = bucket.param_steps[0]
        devices = (param_step.param.device, param_step.state["step"].device)
        members.setdefault(devices, []).append(bucket)
    return [StepTable(group) for group in members.values()]
