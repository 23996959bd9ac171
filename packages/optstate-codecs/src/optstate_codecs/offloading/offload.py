"""Offload optimizer state to host memory or a file: ``offload`` and ``synchronize``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakMethod

from optstate_codecs import checks
from optstate_codecs.offloading.group_values import GroupValues
from optstate_codecs.offloading.placement import CHUNK_BYTES, Placement
from optstate_codecs.offloading.resume import resume_from
from optstate_codecs.offloading.store import HostStateStore, StateStore
from optstate_codecs.offloading.streaming import StreamingExecutor
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.param_checks import check_params

__all__ = ["STORES", "Offload", "offload", "synchronize"]

STORES = ("host", "disk")


@dataclass(frozen=True)
class Offload:
    """How an optimizer's state is offloaded: the arguments of ``offload``."""

    store: str = "host"
    path: str | None = None
    sync: bool = False
    chunk_bytes: int = CHUNK_BYTES
    resident_bytes: int = 0

    def again(self, optimizer: CodedOptimizer) -> None:
        """Offload a copy of an optimizer likewise, but to the host: a file is not shared."""
        optimizer.offloaded = how = replace(self, store="host", path=None)
        optimizer.executor = how.new_executor(optimizer, HostStateStore())

    def new_executor(self, optimizer: CodedOptimizer, store: StateStore) -> StreamingExecutor:
        """A new executor that keeps the optimizer's state in ``store``."""
        placement = Placement(store, self.chunk_bytes, self.resident_bytes)
        return StreamingExecutor(optimizer.backend, placement)


def offload(
    optimizer: CodedOptimizer,
    store: str = "host",
    *,
    path: str | Path | None = None,
    resume: bool = False,
    sync: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    resident_bytes: int = 0,
) -> CodedOptimizer:
    """Offload optimizer state to CPU memory or disk; steps stay on the parameters' device.

    A step loads the state to the device chunk by chunk, three at a time, and stores it again. The
    result is bitwise equal to that of a step with the state on the device. The step returns before
    all state is stored; ``optimizer.state`` waits for that. For a GPU, host memory is page-locked.
    A file holds every slab twice, and steps alternate between the two. So tensors of
    ``optimizer.state`` show the step after which they were read; read them again after the next.

    Args:
        optimizer: an optimizer of the family. It is changed in place, and its state moves.
        store: "host" or "disk".
        path: the file for "disk", twice the size of the state. ``PATH.json`` beside it is the
            manifest of the last complete step; the two are a checkpoint of the optimizer.
        resume: take state, step counts and param group values from the file, which exists. Make a
            scheduler before, and load its state after.
        sync: flush each step to the disk before its manifest, so that it survives a loss of power.
        chunk_bytes: bytes of state that move at a time; three times as much is on the device.
        resident_bytes: bytes of state that stay on the device, of the first parameters; not "disk".

    Returns:
        ``optimizer``.

    Raises:
        TypeError, ValueError, OSError: an argument is wrong, or the file is not usable; the
            optimizer is unchanged.

    Examples:
        >>> optimizer = offload(AdamW8bit(model.parameters(), lr=2e-5))
    """
    given: Any = optimizer
    if not isinstance(given, CodedOptimizer):
        raise TypeError(
            f"optimizer: {type(given).__name__}, must be an optimizer of the family; "
            "optstate_wrap.OffloadOptimizer takes any other"
        )
    checks.one_of("store", store, STORES)
    resume = checks.flag("resume", resume)
    sync = checks.flag("sync", sync)
    chunk_bytes = checks.whole_number("chunk_bytes", chunk_bytes)
    resident_bytes = checks.whole_number("resident_bytes", resident_bytes)
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes!r}: must be at least 1")
    if (store == "disk") != (path is not None):
        raise ValueError(f"path={path!r}: must be given with store='disk', and only with it")
    if store == "disk" and resident_bytes:
        raise ValueError(
            f"resident_bytes={resident_bytes!r}: must be 0 with store='disk', whose file holds all"
        )
    if (resume or sync) and store != "disk":
        raise ValueError("resume, sync: only with store='disk'")
    _check_params(optimizer)
    if optimizer.offloaded is not None:
        raise ValueError(f"optimizer: its state is offloaded already ({optimizer.offloaded.store})")
    how = Offload(store, None if path is None else str(path), sync, chunk_bytes, resident_bytes)
    state_store: Any = _make_store(path, resume, sync)
    try:
        if resume:
            # parts were cut by the size that the file was made with
            how = replace(how, chunk_bytes=state_store.manifest["chunk_bytes"])
        executor = how.new_executor(optimizer, state_store)
        if store == "disk":
            # a weak reference, since the optimizer refers to the executor
            collect: Any = WeakMethod(optimizer.stored_param_steps)
            executor.all_param_steps = lambda: collect()()
            state_store.groups = GroupValues(optimizer.param_groups)
        # from here on, state is made on the host
        optimizer.offloaded = how
        if resume:
            resume_from(optimizer, executor.placement, state_store)
            state_store.groups.take()
        else:
            _move(optimizer)
    except BaseException:
        optimizer.offloaded = None
        state_store.close(remove=not resume)
        raise
    optimizer.executor = executor
    return optimizer


def synchronize(optimizer: CodedOptimizer) -> None:
    """Wait until all state is stored, and a file's manifest has the present param group values.

    With a file, call this where you save the parameters and the scheduler, after the scheduler's
    step. Until the next step is complete, ``resume=True`` then finds the values of this moment,
    even if the process is killed. The same happens when the next step begins, on ``state_dict()``
    and ``optimizer.state``, and when the optimizer or the process ends.

    Args:
        optimizer: an optimizer of the family, offloaded or not.

    Raises:
        TypeError: the optimizer is not of the family.
        OSError: something could not be written.

    Examples:
        >>> torch.save([model.state_dict(), scheduler.state_dict()], "last.pt")
        >>> synchronize(optimizer)
    """
    given: Any = optimizer
    if not isinstance(given, CodedOptimizer):
        raise TypeError(f"optimizer: {type(given).__name__}, must be an optimizer of the family")
    optimizer.executor.synchronize()


def _check_params(optimizer: CodedOptimizer) -> None:
    """Raise, naming the parameter, unless state can be stepped on every parameter's device."""
    check_params(optimizer)
    for index, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if param.is_meta:
            raise ValueError(
                f"parameter {index}: on meta, must be on a device; to count bytes on meta, take a "
                "step without offload"
            )


def _move(optimizer: CodedOptimizer) -> None:
    """Move existing state to the host."""
    moved = [
        (param_step.state, {key: param_step.state[key].to("cpu") for key in param_step.keys[1:]})
        for param_step in optimizer.stored_param_steps()
    ]
    for state, parts in moved:
        state.update(parts)


def _make_store(path: str | Path | None, resume: bool, sync: bool) -> StateStore:
    """The store in host memory, or in the file at ``path``."""
    if path is None:
        return HostStateStore()
    # imported only when needed, since some systems lack file locks and positional reads
    from optstate_codecs.offloading.disk import DiskStateStore

    return DiskStateStore(path, resume, sync)
