"""Gradient release: parameters are stepped during backward, and their gradients freed at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from types import TracebackType
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
from optstate_codecs.gradients.hooks import Bucket, in_buckets, weakly
from optstate_codecs.gradients.release_checks import (
    Values,
    refuse_changed,
    refuse_step,
    refuse_unreduced,
    values_of,
)
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.param_checks import check_steppable

__all__ = ["GradientRelease"]


class GradientRelease:
    """Steps parameters during backward, so that all gradients never exist at the same time.

    While attached, a bucket of neighbouring parameters is stepped as soon as all of them have
    their gradients, which are then freed. ``optimizer.step()`` steps what is left and completes
    the step: hooks, learning rate schedules and checkpoints are as without. So is every bit of
    parameters and state. All gradients are None after ``step()``.

    Groups' values (the learning rate) must not change between backward and ``step()``, and there
    is one backward a step for each parameter: gradients cannot be accumulated, looked at, clipped
    or unscaled in between. Until ``step()`` or ``zero_grad()``, ``param.grad`` is a tensor without
    memory where a gradient was freed. Every operation on it raises, those of
    ``torch.nn.utils.clip_grad_norm_`` and of whatever calls that included.

    With ``max_grad_norm``, the global norm has to be known before the first bucket is stepped: a
    first forward and backward inside ``measure()`` find it and free each gradient, and a second
    forward and backward step as after ``torch.nn.utils.clip_grad_norm_``.

    Args:
        optimizer: of this family, or wrapped by ``optstate_wrap``.
        bucket_bytes: of gradients, are stepped together; more is fewer launches, and that much
            memory. Larger parameters are stepped alone.
        max_grad_norm: above 0, or None: do not clip.
        allow_distributed: step unsharded parameters although ``torch.distributed`` has several
            workers: nothing reduces their gradients after this has seen them.

    Attributes:
        grad_norm: the last norm that ``measure`` found, 0-d on the gradients' device, or None.

    Raises:
        TypeError, ValueError, RuntimeError: an argument, or what cannot be combined with this; the
            message names it. Also from ``backward`` and ``step``, where it shows only there.

    Example:
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
        self._buckets: list[Bucket] = []
        # what gradients have left behind, by parameter: made once
        self._freed: dict[Tensor, FreedGradient] = {}
        self._second = weakly(self._accumulated)
        # gradients of several devices come in threads of their own
        self._lock = RLock()
        # while measuring, the place of each parameter, and whether any is float64
        self._measuring: dict[Tensor, tuple[int, bool]] = {}
        self.abandon()
        self._refuse()

    def _refuse(self) -> None:
        self.optimizer.refuse_parts()
        if isinstance(self.optimizer, CodedOptimizer):
            for number, param in enumerate(self._params()):
                if param.requires_grad:
                    check_steppable(number, param)
        if not self.allow_distributed:
            refuse_unreduced(self._params())

    def _params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def attach(self) -> GradientRelease:
        """Begin to step in backward; nothing changes where it is attached already."""
        if self._hooks:
            return self
        self._refuse()
        if self.optimizer.steps_in_parts:
            raise RuntimeError("optimizer: another GradientRelease is attached; detach that first")
        self._buckets = in_buckets(self._params(), self.bucket_bytes)
        clear = untraced(remove_before_backward)
        for number, bucket in enumerate(self._buckets):
            # not the bucket: parameters that hold themselves are never collected
            hook = partial(weakly(self._arrived), number)
            for param in bucket.params:
                self._hooks.append(param.register_post_accumulate_grad_hook(hook))
                if self.max_grad_norm is not None:
                    # the second backward must find nothing of the first
                    self._hooks.append(param.register_hook(partial(clear, ref(param))))
        # by these the optimizer keeps this alive
        self._hooks.append(self.optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(self.optimizer.register_step_post_hook(self._after_step))
        self.optimizer.steps_in_parts = True
        self.abandon()
        return self

    def detach(self) -> None:
        """Leave gradients alone from now on; ``step()`` completes a step that has begun."""
        if self._hooks:
            self.optimizer.steps_in_parts = False
            self._remove_freed()
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> GradientRelease:
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def abandon(self) -> None:
        """Forget the step that has begun, after a backward that failed outside of the optimizer.

        What has been stepped stays so; call ``zero_grad()`` too. An error that this has raised
        itself needs only that.
        """
        self._remove_freed()
        self._begin()

    def _begin(self) -> None:
        """Be as before the first gradient of a step."""
        self._stepped: set[Tensor] = set()
        self._shares: dict[Tensor, Share] = {}
        self._factor: Tensor | None = None
        self._values: Values = {}
        self._failed: int | None = None
        self._joining = False
        for bucket in self._buckets:
            bucket.here.clear()

    def __del__(self) -> None:
        if hasattr(self, "_freed"):
            self._remove_freed()

    def _remove_freed(self) -> None:
        for param in self._freed:
            remove_freed(param)

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Inside, a backward only finds the norm of all gradients, for ``max_grad_norm``.

        The next backward must give the same gradients. For dropout, torch's random numbers are
        put back at the end; what else a forward changes (batch norm) it changes twice.
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
        self._measuring = {param: (place, double) for place, param in enumerate(params)}
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            self._measuring = {}
        if self._shares:
            self.grad_norm = norm_of(self._shares[p] for p in params if p in self._shares)
            self._factor = clip_factor(self.grad_norm, self.max_grad_norm)

    def _arrived(self, number: int, param: Tensor) -> None:
        """A parameter of bucket ``number`` has its gradient."""
        bucket = self._buckets[number]
        with self._lock:
            task = torch._C._current_graph_task_id()
            # a group may have a parameter twice, which is stepped with the first
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
                    place, double = self._measuring[param]
                    self._shares[param] = share(place, grad, double)
                    self._free(param)
                    return
                bucket.here.add(param)
                if len(bucket.here) == len(bucket.params):
                    stepping = bucket.params
                    self._step(stepping)
                    self._join_at_the_end()
            except Exception as error:
                self._fail(error, stepping)

    def _accumulated(self, freed: FreedGradient) -> None:
        """A backward is about to add to what the gradient of this step has left behind."""
        with self._lock:
            try:
                for param, left in self._freed.items():
                    if left is freed:
                        self._expect(param)
            except RuntimeError as error:
                self._fail(error, [])

    def _fail(self, error: Exception, stepping: Sequence[Tensor]) -> NoReturn:
        """Raise, in a backward, what says how far the step came; the next one begins anew."""
        before, now = self._numbers(self._stepped), self._numbers(stepping)
        self.abandon()
        self._failed = torch._C._current_graph_task_id()
        raise RuntimeError(
            f"GradientRelease: {type(error).__name__}: {error}; of this step, parameters "
            f"{before} had been stepped, and {now} were about to be; call zero_grad() and "
            "run backward again"
        ) from error

    def _free(self, param: Tensor) -> None:
        """Leave nothing of a parameter's gradient but what notices who looks for it."""
        grad = param.grad
        if grad is None:
            return
        freed = self._freed.get(param)
        if freed is None or not freed.stands_for(grad):
            freed = self._freed[param] = FreedGradient(grad, self._advice(), self._second)
        param.grad = freed

    def _advice(self) -> str:
        if self.max_grad_norm is None:
            how = "to clip, use GradientRelease(optimizer, max_grad_norm=...) with measure()"
        else:
            how = f"max_grad_norm={self.max_grad_norm} has clipped it, see grad_norm"
        return f"{how}, and no other clipping (max_grad_norm=0 for transformers.Trainer)"

    def _join_at_the_end(self) -> None:
        """Have what follows this backward wait for steps that are taken beside it."""
        if not self._joining:
            self._joining = True
            # as torch's own data parallelism ends its backward
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._join)

    def _join(self) -> None:
        self._joining = False
        self.optimizer.join_parts()

    def _expect(self, param: Tensor) -> None:
        """Raise if this gradient must not be there now."""
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
        """Step those that have gradients, and free these."""
        if capturing():
            raise RuntimeError("CUDA graph capture: cannot be combined with GradientRelease")
        self.optimizer.refuse_parts()
        refuse_changed(self._values, values_of(self.optimizer))
        given = [param for param in params if param.grad is not None]
        if not given:
            return
        self.optimizer.step_part(given, self._factor)
        for param in given:
            # kernels write where autograd does not see it: what still needs the old value must fail
            torch.autograd.graph.increment_version(param)
            self._free(param)
        self._stepped.update(given)
        self._values = values_of(self.optimizer)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Refuse what cannot be, and step what is left."""
        refuse_step(optimizer, args[1:], kwargs)
        if self._failed is not None:
            raise RuntimeError("step(): backward has failed; call zero_grad() and run it again")
        # the optimizer and the hooks that follow are to find no gradients
        self._remove_freed()
        left = [param for param in self._params() if param.grad is not None]
        for param in left:
            self._expect(param)
        self._step(left)
        for param in left:
            param.grad = None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._begin()
