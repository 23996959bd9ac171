"""Keeping the state of an optimizer of the family elsewhere than on the device that steps it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import ref

from optstate_codecs import checks
from optstate_codecs.engine.request import ParamStep
from optstate_codecs.offloading.group_values import GroupValues
from optstate_codecs.offloading.resume import resume_from
from optstate_codecs.offloading.store import HostStateStore, StateStore
from optstate_codecs.offloading.streaming import CHUNK_BYTES, StreamingExecutor
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.param_checks import check_params

__all__ = ["STORES", "Offload", "offload", "synchronize"]

STORES = ("host", "disk")


@dataclass(frozen=True)
class Offload:
    """How an optimizer's state is kept elsewhere; the arguments of ``offload``."""

    store: str = "host"
    path: str | None = None
    sync: bool = False
    chunk_bytes: int = CHUNK_BYTES
    resident_bytes: int = 0

    def again(self, optimizer: CodedOptimizer) -> None:
        """Have a copy of an optimizer keep its state as the first does; a file is not shared."""
        optimizer.offloaded = how = replace(self, store="host", path=None)
        optimizer.executor = how.new_executor(optimizer, HostStateStore())

    def new_executor(self, optimizer: CodedOptimizer, store: StateStore) -> StreamingExecutor:
        """A session that keeps the optimizer's state in ``store``."""
        return StreamingExecutor(optimizer.backend, store, self.chunk_bytes, self.resident_bytes)


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
    """Keep an optimizer's state in host memory or in a file; steps stay on the parameters' device.

    A step brings the state to the device chunk by chunk, three at a time, while others go back, and
    gives the very bits that it would give with the state beside the parameters. It returns before
    all is back: ``optimizer.state`` waits for that. On a GPU the host's memory is page-locked.
    A file has every slab twice, in turns: tensors of ``optimizer.state`` show the step that they
    were asked for after, and are to be asked for again after the next.

    Args:
        optimizer: of the family; what state it has moves. It is changed in place.
        store: "host", or "disk".
        path: of the file that "disk" keeps state in, twice its size; ``PATH.json`` beside it is the
            manifest of the last whole step, which makes the two a checkpoint of the optimizer.
        resume: take state, step counts and the values of param groups from the file, which is
            there. Make a scheduler before, and load its state after.
        sync: have each step reach the disk before its manifest does, as a loss of power demands.
        chunk_bytes: of state that moves at a time; three times as much is taken on the device.
        resident_bytes: of state that stays on the device, the first parameters', not with "disk".

    Returns:
        ``optimizer``.

    Raises:
        TypeError, ValueError, OSError: an argument is wrong, or the file is not usable; the
            optimizer is as it was.

    Example:
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
            # parts are what they were
            how = replace(how, chunk_bytes=state_store.manifest["chunk_bytes"])
        executor = how.new_executor(optimizer, state_store)
        if store == "disk":
            # no reference to the optimizer, which has the executor
            state_store.groups, this = GroupValues(optimizer.param_groups), ref(optimizer)
            executor.all_param_steps = lambda: _stored_param_steps(this())
        # from here on state belongs on the host
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
    """Wait until all state is stored, with a file's manifest saying what param groups hold now.

    A step and a scheduler's step after it are one checkpoint: with a file, call this where you save
    the parameters and the scheduler, and ``resume=True`` finds the values of that moment, wherever
    the process is killed until the next step is complete. The next step does it as it begins, and
    so do ``state_dict()``, ``optimizer.state``, and the end of the optimizer or of the process.

    Args:
        optimizer: of the family, offloaded or not.

    Raises:
        TypeError: the optimizer is not of the family.
        OSError: something could not be written.

    Example:
        >>> torch.save([model.state_dict(), scheduler.state_dict()], "last.pt")
        >>> synchronize(optimizer)
    """
    given: Any = optimizer
    if not isinstance(given, CodedOptimizer):
        raise TypeError(f"optimizer: {type(given).__name__}, must be an optimizer of the family")
    optimizer.executor.synchronize()


def _stored_param_steps(optimizer: CodedOptimizer | None) -> list[ParamStep]:
    assert optimizer is not None
    return optimizer.stored_param_steps()


def _check_params(optimizer: CodedOptimizer) -> None:
    """Raise unless state can come to every parameter, by name."""
    check_params(optimizer)
    for index, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if param.is_meta:
            raise ValueError(
                f"parameter {index}: on meta, must be on a device; to count bytes on meta, take a "
                "step without offload"
            )


def _move(optimizer: CodedOptimizer) -> None:
    """Bring what state there is to the host."""
    moved = [
        (param_step.state, {key: param_step.state[key].to("cpu") for key in param_step.keys[1:]})
        for param_step in optimizer.stored_param_steps()
    ]
    for state, parts in moved:
        state.update(parts)


def _make_store(path: str | Path | None, resume: bool, sync: bool) -> StateStore:
    """The host, or the file at ``path``."""
    if path is None:
        return HostStateStore()
    # locks and positional reads are not on every system, and only this wants them
    from optstate_codecs.offloading.disk import DiskStateStore

    return DiskStateStore(path, resume, sync)
