"""``OptimizerWrapper``: wraps any ``torch.optim`` optimizer and stores its state compressed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs import checks
from optstate_codecs.custom_op import call_step_op, register_step
from optstate_wrap.delegate import Delegate
from optstate_wrap.offload.host import make_store
from optstate_wrap.policies import Policy, WarmupPolicy
from optstate_wrap.probe import Findings, first_param, probe
from optstate_wrap.report import WrapperMemoryReport, report
from optstate_wrap.state import checkpoint, loading
from optstate_wrap.state.param_chunks import MIN_CHUNK_SIZE, ParamChunk, default_chunk_size
from optstate_wrap.state.store import Store
from optstate_wrap.state.view import StateView
from optstate_wrap.step.checks import check_params, check_records
from optstate_wrap.step.chunked import Engine
from optstate_wrap.step.timing import now

__all__ = ["OptimizerWrapper"]


class OptimizerWrapper(Delegate):
    """Stores the state of any optimizer compressed, and decodes it chunk by chunk for the step.

    ``param_groups`` and ``defaults`` are the inner optimizer's own objects. ``state`` is a mapping
    that decodes a state when it is read. With exact codecs, results have the same bits as without
    the wrapper. (On a CPU with several threads, torch's own steps of bfloat16 parameters depend in
    some last bits on how a tensor is divided among threads, and so also on how it is split.)

    Args:
        optimizer: the inner optimizer; its existing state is taken over.
        policy: selects the codec of each state key; None: ``WarmupPolicy`` for first moments under
            any of the usual keys.
        chunk_size: number of elements decoded at a time, at least 256; larger tensors are split if
            the optimizer allows it. None: 16 Mi on a GPU, or 8 Mi if its state is in host memory,
            and 512 Ki on a CPU.
        chunk_size_on_cuda: replaces ``chunk_size`` if the first parameter is on a GPU.
        initial_chunk_size: ``chunk_size`` of the step that creates the state; 1 decodes one tensor
            at a time.
        pin_memory: whether host memory for state is page-locked; None: if parameters are on a GPU.
        profile: fill ``last_step_timings``.
        store: "device" stores state on the parameters' device, "host" in host memory.
        strict: raise if the optimizer cannot be stepped in chunks, instead of stepping it whole.
        rounding_seed: keys every random number, 0 to 2^63 - 1.
        packed_checkpoints: whether ``state_dict`` returns state as it is stored, so that trainers
            resume bit for bit. False: decoded, as ``torch.optim`` can load it.
        fused: whether the codecs' kernel decodes, steps and encodes coded state at once, if the
            inner optimizer is torch's Adam, AdamW or SGD. None: for float32 parameters, where the
            result differs only in the last bit. True: also for bfloat16 and float16 ones, in
            float32 arithmetic. False: never.

    Attributes:
        packed_checkpoints: the argument; may be changed.
        last_step_timings: with ``profile``, milliseconds of the parts of the last step.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.

    Examples:
        >>> optimizer = OptimizerWrapper(torch.optim.AdamW(model.parameters(), lr=3e-4))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        policy: Policy | None = None,
        chunk_size: int | None = None,
        chunk_size_on_cuda: int | None = None,
        initial_chunk_size: int | None = None,
        pin_memory: bool | None = None,
        profile: bool = False,
        *,
        store: str | Store | None = None,
        strict: bool = False,
        rounding_seed: int = 0,
        fused: bool | None = None,
        packed_checkpoints: bool = False,
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, OptimizerWrapper):
            got = type(optimizer).__name__
            raise TypeError(f"optimizer: must be a torch.optim.Optimizer, not wrapped, got {got}")
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(f"policy={policy!r}: must be a Policy, got {type(policy).__name__}")
        chunk_size = _chunk_size("chunk_size", chunk_size, MIN_CHUNK_SIZE)
        chunk_size_on_cuda = _chunk_size("chunk_size_on_cuda", chunk_size_on_cuda, MIN_CHUNK_SIZE)
        initial_chunk_size = _chunk_size("initial_chunk_size", initial_chunk_size, 1)
        rounding_seed = checks.whole_number("rounding_seed", rounding_seed)
        profile = checks.flag("profile", profile)
        strict = checks.flag("strict", strict)
        packed_checkpoints = checks.flag("packed_checkpoints", packed_checkpoints)
        fused = None if fused is None else checks.flag("fused", fused)
        if policy is None:
            policy = WarmupPolicy(momentum_key=("exp_avg", "momentum_buffer"))
        if store is None:
            store = "host" if policy.device_resident is False else "device"
        device = first_param(optimizer).device
        if device.type != "cpu" and chunk_size_on_cuda is not None:
            chunk_size = chunk_size_on_cuda
        records = make_store(store, pin_memory)
        on_host = records.name == "host"
        batch_size = default_chunk_size(device, on_host) if chunk_size is None else chunk_size
        first = batch_size if initial_chunk_size is None else min(initial_chunk_size, batch_size)
        self.inner = optimizer
        self.engine = Engine(optimizer, policy, records, batch_size, first, rounding_seed, fused)
        self.engine.timer.on = profile
        self.strict = strict
        self.packed_checkpoints = packed_checkpoints
        self.last_step_timings: dict[str, float] = {}
        self._warned = False
        self.attach_inner()
        self.examine()
        existing, optimizer.state = optimizer.state, type(optimizer.state)(dict)
        self.state.update(existing)
        self.engine.states.discard_read_states()

    def attach_inner(self) -> None:
        super().attach_inner()
        self._handle = register_step(self._traced_params, self._step_with)
        # under the name param_groups, torch.compile would guard on every value in the list
        self.traced_groups = self.param_groups

    def examine(self) -> Findings:
        """Probe how the inner optimizer may be stepped with its current hyper-parameters.

        Raises:
            ValueError: ``strict``, and it cannot be stepped in chunks.
        """
        self.findings: Findings = probe(self.inner)
        name = type(self.inner).__name__
        if not self.findings.chunked:
            if self.strict:
                raise ValueError(f"optimizer={name}: cannot be stepped in chunks; use strict=False")
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{name} cannot be stepped in chunks with the same result, so all of its state "
                    "is decoded at once for each step",
                    stacklevel=3,
                )
        self.engine.encoder.chunked = self.findings.chunked
        self.engine.encoder.splittable = self.findings.splittable
        self.engine.states.known = self.findings.known
        return self.findings

    @property
    def state(self) -> Any:
        """The decoded state by parameter, as the inner optimizer makes it.

        Read and change it as in ``torch.optim``: assign and delete entries, or change tensors in
        place. Before the next use of the state, a changed tensor is stored in the format that it
        had; all others keep their bits. Entries under keys that the optimizer does not make are
        stored unchanged.

        Reading the state of a parameter keeps it decoded until the next step, and returns the same
        object until then. Read it again after a step: an object from before the step does not show
        the step, and changing it has no effect. Changes through ``.data`` or ``.numpy()``, which a
        tensor's version counter does not count, are found only if the tensor is stored uncoded;
        assign the tensor instead.
        """
        return StateView(self.engine.states)

    @state.setter
    def state(self, value: Mapping[Any, dict[str, Any]]) -> None:
        new = dict(value)
        for param, state in new.items():
            if isinstance(param, Tensor) and not isinstance(state, Mapping):
                raise TypeError(f"state: of a parameter must be a dict, got {type(state).__name__}")
        self.engine.states.clear()
        self.state.update(new)

    @property
    def policy(self) -> Policy:
        """The policy that chooses the codec of each state key."""
        return self.engine.encoder.policy

    @property
    def compression_active(self) -> bool:
        """Whether the policy encodes any state at the next step."""
        return self.policy.compressing(self.engine.encoder.steps)

    #: of pickles that were made before there was the option
    packed_checkpoints = False
    #: set while a ``GradientRelease`` steps parameters before ``step`` is called
    steps_in_parts = False

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self.steps_in_parts or bool(getattr(self.inner, "_step_supports_amp_scaling", False))

    def _check(self, chunks: Sequence[ParamChunk]) -> None:
        """Raise if the parameter of a chunk cannot be stepped."""
        check_params((c.number, c.param, c.param.grad) for c in chunks if not c.part)
        check_records(self.inner, chunks, self.engine.store, self.findings)

    def refuse_parts(self) -> None:
        """Raise if the step of a parameter depends on the gradients of others."""
        if not self.findings.chunked:
            raise ValueError(
                f"optimizer={type(self.inner).__name__}: cannot be stepped in chunks with the same "
                "result, and so not by GradientRelease; step it after backward, without"
            )

    @torch.no_grad()
    def step_part(self, params: Sequence[Tensor], factor: Tensor | None = None) -> None:
        """Step these parameters, after multiplying their gradients by ``factor``."""
        if factor is not None:
            for grad in [p.grad for p in dict.fromkeys(params) if p.grad is not None]:
                grad.mul_(factor.to(grad.device))
        self.engine.step(some=set(params), check=self._check)

    def join_parts(self) -> None:
        """Make the current stream wait for the parts that were stepped."""
        self.engine.fused.join()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; if that raises, nothing has changed."""
        count = len(self.param_groups)
        self.inner.add_param_group(param_group)
        try:
            self.examine()
        except BaseException:
            del self.param_groups[count:]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients in ``param.grad``.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients on.
                An optimizer that cannot be stepped in chunks may call it several times.

        Returns:
            The result of the closure, or None.

        Raises:
            RuntimeError: a parameter, its gradient or its state cannot be stepped; nothing has
                changed.
            StepError: from the error of a failed step; every parameter is before or after its step.
        """
        loss, chunked = None, self.engine.encoder.chunked
        if closure is not None and chunked:
            with torch.enable_grad():
                loss = closure()
            closure = None
        if torch.compiler.is_compiling() and closure is None:
            call_step_op(self._handle, self.traced_groups)
            return loss
        returned = self._step(closure)
        return loss if chunked else returned

    def _traced_params(self) -> list[Tensor]:
        """All parameters; raises if ``param_groups`` is not the list that was traced."""
        if self.traced_groups is not self.param_groups:
            raise RuntimeError(
                "optstate::step: optimizer.param_groups is another list than the compiled one; "
                "take a step outside torch.compile and compile again"
            )
        return [param for group in self.param_groups for param in group["params"]]

    def _step_with(self, grads: Mapping[int, Tensor]) -> None:
        """Step with these gradients, by the parameters' numbers, in place of their own."""
        params = self._traced_params()
        before = [param.grad for param in params]
        try:
            for number, param in enumerate(params):
                param.grad = grads.get(number)
            self._step(None)
        finally:
            for param, grad in zip(params, before, strict=True):
                param.grad = grad

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """The step after the closure, or with one that the inner optimizer calls."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("CUDA graph: a wrapped step makes new state and cannot be recorded")
        engine, self.traced_groups = self.engine, self.param_groups
        began = now() if engine.timer.on else 0.0
        engine.timer.start()
        scaling = {n: getattr(self, n) for n in ("grad_scale", "found_inf") if hasattr(self, n)}
        vars(self.inner).update(scaling)
        try:
            # with a closure that the optimizer calls, gradients do not exist yet
            returned = engine.step(closure, check=self._check if closure is None else None)
        finally:
            for name in scaling:
                delattr(self.inner, name)
        if engine.timer.on:
            self.last_step_timings = engine.timer.report(now() - began)
        return returned

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict, decoded; ``torch.optim`` can load it.

        It also has the policy's progress, under a key that ``torch.optim`` ignores. With
        ``packed_checkpoints`` it is packed instead, as ``packed_state_dict`` says.

        Raises:
            ValueError: ``packed_checkpoints``, and the state cannot be packed for all workers.
        """
        if self.packed_checkpoints:
            return checkpoint.packed_for_trainers(self, self.engine.states)
        return checkpoint.plain(self, self.engine.states)

    def packed_state_dict(self, per_rank: bool = False) -> dict[str, Any]:
        """A state dict in the stored form: tensors and plain Python values, of the state's size.

        If it is loaded into a wrapper with the same arguments, training continues bit for bit.

        State of ``DTensor``s is in ``DTensor``s, which ``torch.distributed.checkpoint`` can load on
        another number of workers. All workers have to load it together.

        Args:
            per_rank: save the state of ``DTensor``s as this worker's own. Only the worker of the
                same rank, of equally many, can load it.

        Raises:
            ValueError: not ``per_rank``, and the state of a ``DTensor`` is this worker's own:
                stored in a format that needs the whole tensor, or a plain tensor.
        """
        return checkpoint.packed(self.engine.states, checks.flag("per_rank", per_rank))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a plain state dict, of the inner optimizer or of a wrapper, or a packed one.

        Nothing of ``state_dict`` is aliased, and ``param_groups`` stay the same objects. State that
        is loaded under ``torch.inference_mode()`` can be stepped outside of it. Entries under keys
        that the optimizer does not make are stored unchanged.

        Raises:
            TypeError, ValueError, KeyError: an entry does not fit; the message names it, and
                nothing has changed.
        """
        loading.load(self, self.engine.states, self.examine, state_dict)

    def memory_report(self) -> WrapperMemoryReport:
        """Count the current bytes of parameters, gradients and state."""
        return report(self.engine.states)

    def unwrap(self) -> Optimizer:
        """Return the inner optimizer with its state decoded; this wrapper then has no state.

        Examples:
            >>> optimizer = optimizer.unwrap()
        """
        states, state = self.engine.states, type(self.inner.state)(dict)
        state.update({param: states.copy(param) for param in states})
        state.update(states.extra)
        self.inner.state = state
        states.clear()
        return self.inner

    def __getstate__(self) -> dict[str, Any]:
        # before the records are copied
        self.engine.states.write_back()
        names = ("inner", "engine", "strict", "findings", "_warned", "last_step_timings")
        return {name: getattr(self, name) for name in (*names, "packed_checkpoints")}

    def set_torch_state(self, values: dict[str, Any]) -> None:
        inner, empty = self.inner, self.inner.state
        inner.__setstate__(values)
        state, inner.state = inner.state, empty
        self.examine()
        if "state" in values:
            self.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"


def _chunk_size(name: str, value: int | None, least: int) -> int | None:
    if value is None:
        return None
    size = checks.whole_number(name, value)
    if size < least:
        raise ValueError(f"{name}={size}: must be at least {least} parameters")
    return size
