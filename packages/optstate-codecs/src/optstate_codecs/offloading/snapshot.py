"""Copy-on-write snapshots: a state dict that stays unchanged while training continues.

State in slabs is not copied. A snapshot holds the memory that a slab is in, so that the next step
stores the slab in another memory; see ``StateStore.target``.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor

from optstate_codecs.offloading.slabs import Memory
from optstate_codecs.offloading.streaming import StreamingExecutor
from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.param_checks import check_params

__all__ = ["Snapshot", "snapshot"]

StateDict = dict[str, Any]


class Snapshot:
    """An optimizer's packed state dict as it was when ``snapshot`` was called.

    It is valid until ``close()``, the end of the ``with`` block, or garbage collection: keep the
    snapshot, not only its state dict. It does not need the optimizer, and may be read and closed on
    any thread.
    """

    def __init__(self, saved: StateDict, memories: list[Memory]) -> None:
        self._saved: StateDict | None = saved
        self._memories = memories
        self._token = object()
        for memory in memories:
            memory.holders.add(self._token)

    def state_dict(self) -> StateDict:
        """The state dict, with all tensors on the host; each call returns the same one.

        Only read its tensors, and only until the snapshot is closed: training then writes to the
        memory of some of them.

        Raises:
            ValueError: the snapshot is closed.
        """
        if self._saved is None:
            raise ValueError("snapshot: closed; its memory is the optimizer's again")
        return self._saved

    def close(self) -> None:
        """Give the memory back to the optimizer; later calls do nothing."""
        memories, self._memories, self._saved = self._memories, [], None
        for memory in memories:
            memory.holders.discard(self._token)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_token"):
            self.close()


def snapshot(optimizer: CodedOptimizer) -> Snapshot:
    """Take the current packed state dict, to save it while training continues.

    Offloaded state is not copied: this waits until the last step is stored, and returns. While the
    snapshot is open, steps store their result in other memory, on the host or in the file, which
    takes at most the size of the state once more. Later snapshots use the same memory again; it is
    freed with the optimizer. If there is no room for it, the step raises, and nothing has changed.
    Everything else is copied to the host: step counts, group values, and state on the parameters'
    devices. Parameters are not included.

    Call it between steps, on the thread that takes them. Read ``optimizer.state`` again after the
    next step: earlier tensors still show the snapshot's memory, and changing them changes the
    snapshot. A snapshot in a file becomes invalid when another optimizer resumes from the file
    (``resume=True``).

    Args:
        optimizer: an optimizer of the family, offloaded or not.

    Returns:
        A context manager; several may be open at once.

    Raises:
        TypeError: the optimizer is not of the family, or a parameter is a DTensor.

    Examples:
        >>> with snapshot(optimizer) as taken:
        ...     saving = Thread(target=torch.save, args=(taken.state_dict(), "optimizer.pt"))
        ...     saving.start()
        ...     train(steps=100)
        ...     saving.join()
    """
    given: Any = optimizer
    if not isinstance(given, CodedOptimizer):
        raise TypeError(
            f"optimizer: {type(given).__name__}, must be an optimizer of the family; of one that "
            "optstate_wrap has wrapped, packed_state_dict() is a copy"
        )
    check_params(optimizer)
    saved = optimizer.state_dict()
    executor = optimizer.executor
    kept: dict[int, Memory] = {}
    if isinstance(executor, StreamingExecutor):
        # by the tensor that ``optimizer.state`` shows, unless the user has replaced it
        kept = {
            id(entry.values[key]): entry.slab.memory
            for entry in executor.placement.entries
            if entry.slab is not None
            for key in entry.starts
        }
    memories: dict[int, Memory] = {}
    saved = _frozen(saved, kept, memories)
    return Snapshot(saved, list(memories.values()))


def _frozen(value: Any, kept: dict[int, Memory], memories: dict[int, Memory]) -> Any:
    """A copy of ``value`` but for tensors that are ``kept``, whose memories ``memories`` gets."""
    if isinstance(value, Tensor):
        memory = kept.get(id(value))
        if memory is None:
            return value.detach().to("cpu", copy=True)
        memories[id(memory)] = memory
        return value
    if isinstance(value, dict):
        return {key: _frozen(item, kept, memories) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_frozen(item, kept, memories) for item in value)
    return deepcopy(value)
