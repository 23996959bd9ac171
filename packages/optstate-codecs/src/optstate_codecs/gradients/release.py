"""Gradient release: steps parameters during backward and frees their gradients at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any, NoReturn
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from optstate_codecs import checks
from optstate_codecs.custom_op import untraced
from optstate_codecs.engine.capture import capturing
from optstate_codecs.gradients.freed_grad import (
    FreedGradient,
    has_gradient,
    remove_before_backward,
    remove_freed,
)
from optstate_codecs.gradients.grad_norm import Share, clip_factor, norm_of, share
from optstate_codecs.gradients.hooks import ParamSpan, spans_of, weakly
from optstate_codecs.gradients.release_checks import (
    Values,
    check_reduced,
    check_step_call,
    check_unchanged,
    values_of,
)
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.param_checks import check_steppable

__all__ = ["GradientRelease"]


class GradientRelease:
    """Steps parameters during backward, so that all gradients never exist at the same time.

    While attached, neighbouring parameters are stepped together as soon as all of them have their
    gradients, which are then freed. ``optimizer.step()`` steps the remaining ones and completes
    the step. Hooks, learning rate schedules and checkpoints work as without release, and every bit
    of parameters and state is the same. All gradients are None after ``step()``.

    Values of groups (the learning rate) must not change between backward and ``step()``, and each
    parameter takes part in one backward per step: gradients cannot be accumulated, read, clipped
    or unscaled in between. Until ``step()`` or ``zero_grad()``, ``param.grad`` of a freed gradient
    is a tensor without memory. Every operation on it raises, also inside
    ``torch.nn.utils.clip_grad_norm_``.

    ``max_grad_norm`` needs the global norm before the first step: a first forward and backward
    inside ``measure()`` compute it and free each gradient, and a second forward and backward step
    as after ``torch.nn.utils.clip_grad_norm_``.

    Args:
        optimizer: of this family, or wrapped by ``optstate_wrap``.
        bucket_bytes: of gradients stepped together: more bytes are fewer launches, and more
            memory. Larger parameters are stepped alone.
        max_grad_norm: above 0, or None: do not clip.
        allow_distributed: step unsharded parameters although ``torch.distributed`` has several
            workers, because nothing reduces their gradients after backward.

    Attributes:
        grad_norm: the last norm that ``measure`` computed, 0-d on the gradients' device, or None.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid, or something cannot be combined
            with this; the message names it. Also raised by ``backward`` and ``step``.

    Examples:
        >>> with GradientRelease(optimizer):
        ...     for batch in batches:
        ...         loss_of(model, batch).backward()
        ...         optimizer.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        bucket_bytes: int = 128 * 2**20,
        max_grad_norm: float | None = None,
        allow_distributed: bool = False,
    ) -> None:
        if not hasattr(optimizer, "step_part"):
            raise TypeError(
                f"optimizer={type(optimizer).__name__}: must be one of this family, or wrapped: "
                "optstate_wrap.wrap(optimizer)"
            )
        bucket_bytes = checks.whole_number("bucket_bytes", bucket_bytes)
        if max_grad_norm is not None:
            max_grad_norm = checks.positive("max_grad_norm", max_grad_norm)
        allow_distributed = checks.flag("allow_distributed", allow_distributed)
        self.optimizer: Any = optimizer
        self.bucket_bytes = bucket_bytes
        self.max_grad_norm = max_grad_norm
        self.allow_distributed = allow_distributed
        self.grad_norm: Tensor | None = None
        self._hooks: list[Any] = []
        self._spans: list[ParamSpan] = []
        # placeholders of freed gradients, by parameter; reused from step to step
        self._freed: dict[Tensor, FreedGradient] = {}
        self._on_accumulation = weakly(self._accumulated)
        # each device's gradients come on a thread of its own
        self._lock = RLock()
        # during ``measure``: the index of each parameter, and whether any is float64
        self._measuring: dict[Tensor, tuple[int, bool]] = {}
        self.abandon()
        self._check()

    def _check(self) -> None:
        self.optimizer.refuse_parts()
        if isinstance(self.optimizer, CodedOptimizer):
            for number, param in enumerate(self._params()):
                if param.requires_grad:
                    check_steppable(number, param)
        if not self.allow_distributed:
            check_reduced(self._params())

    def _params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def attach(self) -> GradientRelease:
        """Start stepping in backward; does nothing if attached already."""
        if self._hooks:
            return self
        self._check()
        if self.optimizer.steps_in_parts:
            raise RuntimeError("optimizer: another GradientRelease is attached; detach that first")
        self._spans = spans_of(self._params(), self.bucket_bytes)
        clear = untraced(remove_before_backward)
        for number, span in enumerate(self._spans):
            # not the span itself: a parameter that its own hook refers to is never collected
            hook = partial(weakly(self._gradient_ready), number)
            for param in span.params:
                self._hooks.append(param.register_post_accumulate_grad_hook(hook))
                if self.max_grad_norm is not None:
                    # the second backward must not find placeholders of the first
                    self._hooks.append(param.register_hook(partial(clear, ref(param))))
        # through these hooks the optimizer keeps this object alive
        self._hooks.append(self.optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(self.optimizer.register_step_post_hook(self._after_step))
        self.optimizer.steps_in_parts = True
        self.abandon()
        return self

    def detach(self) -> None:
        """Stop stepping in backward; ``step()`` completes a step that has begun."""
        if self._hooks:
            self.optimizer.steps_in_parts = False
            self._remove_freed()
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> GradientRelease:
        return self.attach()

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    def abandon(self) -> None:
        """Discard the step that has begun, after a backward that failed outside of the optimizer.

        Parameters that have been stepped stay stepped; call ``zero_grad()`` too. After an error
        that this object raised, ``zero_grad()`` is enough.
        """
        self._remove_freed()
        self._begin_step()

    def _begin_step(self) -> None:
        """Reset to the state before the first gradient of a step."""
        self._stepped: set[Tensor] = set()
        self._shares: dict[Tensor, Share] = {}
        self._factor: Tensor | None = None
        self._values: Values = {}
        self._failed: int | None = None
        self._joining = False
        for span in self._spans:
            span.ready.clear()

    def __del__(self) -> None:
        if hasattr(self, "_freed"):
            self._remove_freed()

    def _remove_freed(self) -> None:
        for param in self._freed:
            remove_freed(param)

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Inside, a backward only computes the norm of all gradients, for ``max_grad_norm``.

        The next backward must give the same gradients. For dropout, the state of torch's random
        generators is restored at the end; other effects of a forward (batch norm) happen twice.
        """
        if self.max_grad_norm is None:
            raise ValueError("max_grad_norm=None: must be above 0 for measure()")
        params = self._params()
        if not self._hooks or self._stepped or any(map(has_gradient, params)):
            raise RuntimeError(
                "measure(): must be attached, with no gradients there; call step() or zero_grad()"
            )
        self.abandon()
        devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
        double = any(p.dtype == torch.float64 for p in params)
        self._measuring = {param: (index, double) for index, param in enumerate(params)}
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            self._measuring = {}
        if self._shares:
            self.grad_norm = norm_of(self._shares[p] for p in params if p in self._shares)
            self._factor = clip_factor(self.grad_norm, self.max_grad_norm)

    def _gradient_ready(self, number: int, param: Tensor) -> None:
        """A parameter of span ``number`` has its gradient."""
        span = self._spans[number]
        with self._lock:
            task = torch._C._current_graph_task_id()
            # a group may hold a parameter twice: it is stepped the first time
            grad = param.grad if has_gradient(param) else None
            if grad is None or (task == self._failed and task >= 0):
                return
            self._failed = None
            stepping: list[Tensor] = []
            try:
                if torch.is_grad_enabled():
                    raise RuntimeError("create_graph=True: its graph needs parameters as they were")
                self._expect(param)
                if self._measuring:
                    index, double = self._measuring[param]
                    self._shares[param] = share(index, grad, double)
                    self._free(param)
                    return
                span.ready.add(param)
                if len(span.ready) == len(span.params):
                    stepping = span.params
                    self._step(stepping)
                    self._join_at_the_end()
            except Exception as error:
                self._fail(error, stepping)

    def _accumulated(self, freed: FreedGradient) -> None:
        """A backward is about to add to a gradient that this step has freed."""
        with self._lock:
            try:
                for param, left in self._freed.items():
                    if left is freed:
                        self._expect(param)
            except RuntimeError as error:
                self._fail(error, [])

    def _fail(self, error: Exception, stepping: Sequence[Tensor]) -> NoReturn:
        """Raise an error in backward that says how far the step came; then start a new step."""
        before, now = self._numbers(self._stepped), self._numbers(stepping)
        self.abandon()
        self._failed = torch._C._current_graph_task_id()
        raise RuntimeError(
            f"GradientRelease: {type(error).__name__}: {error}; of this step, parameters "
            f"{before} had been stepped, and {now} were about to be; call zero_grad() and "
            "run backward again"
        ) from error

    def _free(self, param: Tensor) -> None:
        """Replace a parameter's gradient by a placeholder, on which operations raise."""
        grad = param.grad
        if grad is None:
            return
        freed = self._freed.get(param)
        if freed is None or not freed.matches(grad):
            freed = self._freed[param] = FreedGradient(grad, self._advice(), self._on_accumulation)
        param.grad = freed

    def _advice(self) -> str:
        if self.max_grad_norm is None:
            how = "to clip, use GradientRelease(optimizer, max_grad_norm=...) with measure()"
        else:
            how = f"max_grad_norm={self.max_grad_norm} has clipped it, see grad_norm"
        return (
            f"{how}, and no other clipping (max_grad_norm=0 for transformers.Trainer, and "
            "trainer.accelerator.clip_grad_norm_ = lambda *args, **options: None, since it logs "
            "the norm)"
        )

    def _join_at_the_end(self) -> None:
        """At the end of this backward, have the current stream wait for the steps in it."""
        if not self._joining:
            self._joining = True
            # torch's own data parallelism uses the same callback
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._join)

    def _join(self) -> None:
        self._joining = False
        self.optimizer.join_parts()

    def _expect(self, param: Tensor) -> None:
        """Raise if this gradient was not to be expected now."""
        if param in self._stepped or (self._measuring and param in self._shares):
            raise RuntimeError(
                f"parameter {self._numbers([param])[0]}: a second gradient in one step; gradients "
                "cannot be accumulated: call step() after each backward, and abandon() after one "
                "that failed"
            )
        if self.max_grad_norm is not None and not self._measuring and param not in self._shares:
            raise RuntimeError(
                f"max_grad_norm={self.max_grad_norm}: parameter {self._numbers([param])[0]} has a "
                "gradient that was not measured; run the same backward inside measure() first"
            )

    def _numbers(self, params: Collection[Tensor]) -> list[int]:
        wanted = set(params)
        return [number for number, param in enumerate(self._params()) if param in wanted]

    @torch.no_grad()
    def _step(self, params: Sequence[Tensor]) -> None:
        """Step the parameters that have gradients, and free the gradients."""
        if capturing():
            raise RuntimeError("CUDA graph capture: cannot be combined with GradientRelease")
        self.optimizer.refuse_parts()
        check_unchanged(self._values, values_of(self.optimizer))
        given = [param for param in params if param.grad is not None]
        if not given:
            return
        self.optimizer.step_part(given, self._factor)
        for param in given:
            # autograd does not see kernels write: a later use of the old value must raise
            torch.autograd.graph.increment_version(param)
            self._free(param)
        self._stepped.update(given)
        self._values = values_of(self.optimizer)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Raise if the step is not allowed; otherwise step the remaining parameters."""
        check_step_call(optimizer, args[1:], kwargs)
        if self._failed is not None:
            raise RuntimeError("step(): backward has failed; call zero_grad() and run it again")
        # the optimizer and later hooks must find no gradients
        self._remove_freed()
        left = [param for param in self._params() if param.grad is not None]
        for param in left:
            self._expect(param)
        self._step(left)
        for param in left:
            param.grad = None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._begin_step()
