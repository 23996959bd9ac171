"""Gradient accumulation in bfloat16 with stochastic rounding, by hooks on parameters.

The sum is ``p.grad``, as optimizers, clipping and ``zero_grad`` expect. A hook before autograd's
accumulation takes the sum out of ``p.grad``, so that autograd stores the new gradient there without
a copy. A hook after it puts the sum back and queues the new gradient. Queued gradients are added in
one launch when they reach ``bucket_bytes``, and at the end of the backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from threading import RLock
from types import TracebackType
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from optstate_codecs import checks
from optstate_codecs.custom_op import untraced
from optstate_codecs.engine.capture import capturing
from optstate_codecs.param_checks import check_kind
from optstate_codecs.sharding import is_distributed
from optstate_codecs.stochastic import SOURCES
from stochbf16.pending import Addition, Pending

__all__ = ["HookHandle", "StochasticAccumulator"]

# advice in the error for DTensor parameters, whose gradients autograd does not accumulate
SHARDED = (
    "let FSDP2 add in float32, with set_requires_gradient_sync(False) and "
    "MixedPrecisionPolicy(reduce_dtype=torch.float32)"
)

_attached: WeakSet[StochasticAccumulator] = WeakSet()


class StochasticAccumulator:
    """Adds the gradients of micro-batches in bfloat16 without losing small ones.

    While attached, every ``backward()`` adds to an existing bfloat16 ``p.grad`` with stochastic
    rounding, so that rounding errors cancel in the mean. The first gradient after ``zero_grad`` is
    stored unchanged. Autograd itself accumulates gradients of other dtypes, sparse ones, subclasses
    of ``Tensor`` and those of ``create_graph=True``. Where ``torch.distributed`` is initialised, or
    a parameter has other hooks that see its sum, each gradient is added at once, in its own launch.
    With a ``DistributedDataParallel`` module as ``params``, that is so only for backwards that
    reduce gradients: those whose forward or backward runs outside of ``no_sync()``.

    The n-th addition to a parameter draws from (``rounding_seed``, n, the parameter's index), so
    that only counts are stored.

    Args:
        params: a module or its parameters. Those that require gradients when it is attached get
            hooks.
        bucket_bytes: how many bytes of gradients may be queued on a device; about that much memory
            is used in addition.
        rounding_seed: 0 to 2^63 - 1. Data-parallel workers that reduce once an accumulation, under
            ``no_sync``, should have different seeds, so that more of the rounding averages out.
            Where every micro-batch is reduced in bfloat16, which rounds to nearest, they should
            share one.

    Examples:
        >>> model = nn.Linear(4, 2, dtype=torch.bfloat16)
        >>> with StochasticAccumulator(model):
        ...     for _ in range(512):
        ...         model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        >>> bool((model.bias.grad > 400).all())  # rounded to nearest, it would stay at 256
        True
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor],
        *,
        bucket_bytes: int = 64 * 2**20,
        rounding_seed: int = 0,
    ) -> None:
        bucket_bytes = checks.whole_number("bucket_bytes", bucket_bytes)
        rounding_seed = checks.whole_number("rounding_seed", rounding_seed)
        self._params = _parameters(params)
        self._reducers = _reducers(params, self._params)
        self._limit = bucket_bytes
        self._seed = rounding_seed
        self._counts = [0] * len(self._params)
        self._hooks: dict[int, tuple[RemovableHandle, RemovableHandle]] = {}
        # autograd runs hooks in one thread a device
        self._lock = RLock()
        self._pending: dict[torch.device, Pending] = {}
        # sums between the two hooks of their parameter, with the backward's graph task
        self._taken: dict[int, tuple[int, Tensor]] = {}
        self._task = -1
        self._accumulates = self._at_once = False

    def attach(self) -> StochasticAccumulator:
        """Add the hooks; does nothing where they exist.

        Raises:
            TypeError: a parameter is a ``DTensor``; no hook was added.
        """
        with self._lock:
            for number, param in enumerate(self._params):
                if is_distributed(param):
                    check_kind(f"params[{number}]", param, SHARDED)
            for number, param in enumerate(self._params):
                if param.requires_grad and number not in self._hooks:
                    self._hooks[number] = self._add_hooks(param, number)
            _attached.add(self)
        return self

    def _add_hooks(self, param: Any, number: int) -> tuple[RemovableHandle, RemovableHandle]:
        accumulator = ref(self)

        def put_back(param: Tensor) -> None:
            alive = accumulator()
            if alive is not None:
                alive._after(number, param)

        before = param.register_hook(untraced(partial(self._before, number)))
        # the garbage collector does not see through this one: a strong reference would be a leak
        after = param.register_post_accumulate_grad_hook(untraced(put_back))
        # first, so that other hooks find the sum in ``p.grad``
        hooks = _hooks_after(param)
        others = [(key, hooks.pop(key)) for key in list(hooks) if key != after.id]
        hooks.update(others)
        return before, after

    def detach(self) -> None:
        """Add queued gradients and remove the hooks; sums stay in ``p.grad``."""
        for number in list(self._hooks):
            self._release(number)
        _attached.discard(self)

    def __enter__(self) -> StochasticAccumulator:
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """The seed, and the number of additions to each parameter."""
        return {"rounding_seed": self._seed, "additions": list(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the random numbers of the saved accumulator."""
        if set(state_dict) != {"rounding_seed", "additions"}:
            keys = ", ".join(map(repr, state_dict))
            raise KeyError(f"state_dict: must have 'rounding_seed' and 'additions', has {keys}")
        seed = checks.whole_number("rounding_seed", state_dict["rounding_seed"])
        counts = [
            checks.whole_number(f"additions[{number}]", count)
            for number, count in enumerate(state_dict["additions"])
        ]
        if len(counts) != len(self._params):
            raise ValueError(
                f"additions: must be {len(self._params)}, one a parameter, got {len(counts)}"
            )
        self._seed, self._counts = seed, counts

    @staticmethod
    def assign_hooks(model: nn.Module) -> list[HookHandle]:
        """Attach an accumulator to ``model`` and return a handle for each parameter's hooks."""
        accumulator = StochasticAccumulator(model).attach()
        return [HookHandle(accumulator, number) for number in accumulator._hooks]

    @staticmethod
    def reassign_grad_buffer(model: nn.Module) -> None:
        """Add the gradients that an interrupted backward left queued.

        Sums are always in ``p.grad``; the method exists for code written for accumulators that kept
        them elsewhere.
        """
        params = set(model.parameters())
        for accumulator in list(_attached):
            if not params.isdisjoint(accumulator._params):
                with accumulator._lock:
                    accumulator._add_stale()

    def _before(self, number: int, new: Tensor | None) -> None:
        """Take the sum out of ``p.grad``."""
        param = self._params[number]
        total = param.grad
        if new is None or total is None or not _is_sum(total) or torch.is_grad_enabled():
            return
        if not param.requires_grad:
            return  # frozen since the forward: autograd drops the gradient
        with self._lock:
            self._notice_backward(param)
            if not self._accumulates:
                return
            self._taken[number] = self._task, total
            param.grad = None

    def _after(self, number: int, param: Tensor) -> None:
        """Put the sum back into ``p.grad``, and queue the new gradient."""
        with self._lock:
            task, total = self._taken.pop(number, (-1, None))
            if total is None or task != torch._C._current_graph_task_id():
                return  # left by another hook's error; it may have been zeroed since
            new, param.grad = param.grad, total
            if new is None:
                return
            if not _is_addable(new, total):
                total.add_(new)
                return
            self._counts[number] += 1
            device = total.device
            pending = self._pending.get(device)
            if pending is None:
                pending = self._pending[device] = Pending(device)
            count, version = self._counts[number], total._version
            pending.append(Addition(param, number, count, total, new, version), self._seed)
            del new
            if self._at_once or pending.bytes >= self._limit or len(_hooks_after(param)) > 1:
                pending.add(self._seed)

    def _notice_backward(self, param: Tensor) -> None:
        """At the first gradient of a backward, find out whether it accumulates gradients."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        if capturing():
            raise RuntimeError(
                "CUDA graph capture: StochasticAccumulator would repeat its random bits at every "
                "replay; capture one micro-batch, with p.grad None before it, or detach it"
            )
        self._add_stale()
        self._task = task
        self._accumulates = _accumulates(param)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._at_once = distributed and self._may_reduce()
        if self._accumulates:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(untraced(self._finish))

    def _may_reduce(self) -> bool:
        """Whether gradients may be reduced during the backward, as soon as each has arrived."""
        # without weak references, a hook would keep a module with its process group alive
        modules: list[Any] = [reference() for reference in self._reducers]
        return not modules or any(
            module is None
            or module.require_backward_grad_sync
            # of the last forward, which decides whether the next backward reduces
            or module.require_forward_param_sync
            for module in modules
        )

    def _finish(self) -> None:
        """Add all queued gradients at the end of a backward."""
        with self._lock:
            for pending in self._pending.values():
                pending.add(self._seed)

    def _add_stale(self) -> None:
        """Add what an interrupted backward left queued, unless its sums have changed since."""
        for pending in self._pending.values():
            pending.add(self._seed, stale=True)

    def _release(self, number: int) -> None:
        """Remove a parameter's hooks."""
        with self._lock:
            self._add_stale()
            for hook in self._hooks.pop(number, ()):
                hook.remove()
            task, total = self._taken.pop(number, (-1, None))
            if total is not None and task == torch._C._current_graph_task_id():
                self._params[number].grad = total


class HookHandle:
    """Removes the hooks of a ``StochasticAccumulator`` from one parameter."""

    def __init__(self, accumulator: StochasticAccumulator, number: int) -> None:
        self._accumulator = accumulator
        self._number = number

    def remove(self) -> None:
        """Add queued gradients and remove the hooks, if they still exist."""
        self._accumulator._release(self._number)


def _parameters(params: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    given = params.parameters() if isinstance(params, nn.Module) else params
    if isinstance(given, Tensor):
        raise TypeError("params: must be a module or an iterable of its parameters, got Tensor")
    found = list(dict.fromkeys(given))
    for number, param in enumerate(found):
        if not isinstance(param, Tensor):
            raise TypeError(f"params[{number}]: must be a tensor, got {type(param).__name__}")
        if not param.is_leaf:
            raise ValueError(f"params[{number}]: must be a leaf, got the result of an operation")
    return found


def _reducers(
    params: nn.Module | Iterable[Tensor], found: Iterable[Tensor]
) -> list[ref[nn.Module]]:
    """The ``DistributedDataParallel`` modules, if they hold all parameters; else none."""
    modules = list(params.modules()) if isinstance(params, nn.Module) else []
    modules = [module for module in modules if isinstance(module, DistributedDataParallel)]
    held = {param for module in modules for param in module.parameters()}
    return list(map(ref, modules)) if held.issuperset(found) else []


def _hooks_after(param: Any) -> Any:
    """All hooks of ``register_post_accumulate_grad_hook``, in the order in which they run."""
    return param._post_accumulate_grad_hooks


def _is_sum(grad: Tensor) -> bool:
    """Whether the accumulator, and not autograd, adds new gradients to ``grad``."""
    return (
        type(grad) is Tensor
        and grad.dtype == torch.bfloat16
        and grad.layout == torch.strided
        and not grad.requires_grad
    )


def _is_addable(new: Tensor, total: Tensor) -> bool:
    return (
        type(new) is Tensor
        and new.dtype in SOURCES
        and new.layout == torch.strided
        and new.device == total.device
        and new.shape == total.shape
    )


def _accumulates(param: Tensor) -> bool:
    """Whether the running backward accumulates gradients, which ``autograd.grad`` does not."""
    node = torch.autograd.graph.get_gradient_edge(param).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # raised for a leaf whose gradient is only returned
        return False
