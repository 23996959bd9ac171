"""State in a file: positional reads and writes on threads, and a manifest that is written last.

Every slab has two places in the file. A step writes to the one that the manifest does not name, and
when all of it is written a new manifest takes the place of the old one in a single renaming: what
the manifest names is always one whole step, wherever the process is killed.
"""

from __future__ import annotations

import atexit
import fcntl
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread, current_thread
from typing import Any
from uuid import uuid4
from weakref import WeakSet

import torch
from torch import Tensor

from optstate_codecs.offloading.group_values import GroupValues
from optstate_codecs.offloading.manifest import manifest_path, read_manifest, write_manifest
from optstate_codecs.offloading.mapped import GRANULARITY, mapped
from optstate_codecs.offloading.pinned import empty_pinned
from optstate_codecs.offloading.slabs import Chunk, Memory, Region, Slab
from optstate_codecs.offloading.store import StateStore
from optstate_codecs.offloading.tasks import Task

__all__ = ["DiskStateStore"]

# to be closed when the process ends, which collects no garbage
_open: WeakSet[DiskStateStore] = WeakSet()
# the file begins with what says which manifest is its own
HEADER = 4096
THREADS = 4
NAME = "optstate-disk"


class DiskStateStore(StateStore):
    """A preallocated file, and beside it ``PATH.json``, the manifest of the last whole step.

    Args:
        path: of the file, which is made.
        resume: the file is there, with its manifest; go on from it.
        sync: have every step reach the disk itself before its manifest does, so that it also
            outlives a loss of power; slow.

    Raises:
        FileExistsError: the file is there, and ``resume`` is False.
        FileNotFoundError: ``resume`` is True and the file or its manifest is not there.
        ValueError: the manifest is not one, or not this file's, or the file has been cut off.
        OSError: another process uses it, or there is no room.
    """

    name = "disk"

    def __init__(self, path: str | Path, resume: bool = False, sync: bool = False) -> None:
        self.path = Path(path)
        self.manifest_path = manifest_path(self.path)
        self.sync = sync
        self.manifest: dict[str, Any] | None = None
        self.groups: GroupValues | None = None
        # what the manifest says, or will
        self._said: dict[str, Any] | None = None
        self._protected: set[int] = set()
        self._reads: dict[int, tuple[Chunk, Task]] = {}
        # the last of each chunk, and of each slot
        self._writes: dict[Chunk, Task] = {}
        self._sinks: dict[int, Task] = {}
        self._rooms: dict[tuple[str, int], Tensor] = {}
        self._sent: dict[int, Any] = {}
        self._written: Task | None = None
        flags = os.O_RDWR if resume else os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            self._file = os.open(self.path, flags, 0o644)
        except FileExistsError as error:
            raise FileExistsError(
                f"path={str(self.path)!r}: there already; use resume=True to go on from it, or "
                "remove it and its manifest"
            ) from error
        self._pool = ThreadPoolExecutor(THREADS, NAME)
        self._owner = os.getpid()
        _open.add(self)
        try:
            self._lock()
            if resume:
                self.manifest = self._said = read_manifest(self.manifest_path)
                self._id, self._end = self.manifest["id"], int(self.manifest["bytes"])
                if os.pread(self._file, 32, 0) != self._id.encode():
                    raise ValueError(
                        f"{self.manifest_path}: the manifest of another file than {self.path}"
                    )
                self._check_size(self._end)
            else:
                self._id, self._end = uuid4().hex, 0
                self._grow(HEADER)
                os.pwrite(self._file, self._id.encode(), 0)
        except BaseException:
            self.close(remove=not resume)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(
                f"path={str(self.path)!r}: in use by another optimizer or process"
            ) from error

    def _check_size(self, nbytes: int) -> None:
        found = os.fstat(self._file).st_size
        if found < nbytes:
            raise ValueError(f"{self.path}: cut off: {found} bytes, must be {nbytes}")

    def _grow(self, nbytes: int) -> int:
        """Take more of the disk; where it begins."""
        start, size = self._end, -(-nbytes // GRANULARITY) * GRANULARITY
        if size:
            try:
                os.posix_fallocate(self._file, start, size)
            except OSError as error:
                with suppress(OSError):  # what there was of it
                    os.ftruncate(self._file, start)
                raise OSError(
                    error.errno, f"{self.path}: no room for {size} more bytes: {error.strerror}"
                ) from error
        self._end = start + size
        return start

    def new(self, nbytes: int) -> Memory:
        return self.mapped(self._grow(nbytes), nbytes)

    def mapped(self, offset: int, nbytes: int) -> Memory:
        """What is in the file from ``offset`` on.

        Raises:
            ValueError: that is not all in it.
        """
        if offset % GRANULARITY or not 0 <= offset <= offset + nbytes <= self._end:
            raise ValueError(f"{self.manifest_path}: a slab of {nbytes} bytes at byte {offset}")
        return Memory(mapped(self._file, offset, nbytes), offset)

    def allocate(self, nbytes: int) -> Slab:
        before = self._end
        try:
            slab = super().allocate(nbytes)
            # the second memory now: a full disk is to be found before a step, not in it
            slab.family.append(self.new(nbytes))
        except OSError:
            # nothing of it is in use: another attempt is to find as much room as this one
            with suppress(OSError):
                os.ftruncate(self._file, before)
                self._end = before
            raise
        return slab

    def writable(self, memory: Memory) -> bool:
        return super().writable(memory) and id(memory) not in self._protected

    def protect(self, memories: Iterable[Memory]) -> None:
        """The manifest names these."""
        self._protected = set(map(id, memories))

    def check(self) -> None:
        self._check_size(self._end)
        self._again()

    def _again(self) -> None:
        """Try again what could not be kept, before a step makes more of it."""
        for task in (*self._writes.values(), self._written):
            if task is not None and task.failed:
                task.result()

    def _room(self, kind: str, chunk: Chunk) -> Tensor:
        """Host memory that a slot's chunks pass through on their way in or out."""
        room = self._rooms.get((kind, chunk.slot))
        if room is None or room.numel() < chunk.nbytes:
            room = empty_pinned(chunk.nbytes, torch.cuda.is_available())
            self._rooms[kind, chunk.slot] = room
        return room

    def prepare(self, chunk: Chunk) -> None:
        reading = self._reads.get(chunk.slot)
        if reading is not None and (reading[0] is chunk or not reading[1].done()):
            return
        # no reference to the place: threads are not to be the last that have it
        room, written, file = self._room("in", chunk), self._writes.get(chunk), self._file
        event, regions, start = self._sent.pop(chunk.slot, None), chunk.regions, chunk.memory.offset

        def read() -> None:
            if written is not None:
                written.result()
            if event is not None:
                event.synchronize()
            for region in regions:
                inside = room[region.offset : region.offset + region.nbytes]
                _read(file, inside, start + region.start)

        self._reads[chunk.slot] = chunk, Task(self._pool, read)

    def ready(self, chunk: Chunk) -> bool:
        reading = self._reads.get(chunk.slot)
        return reading is not None and reading[0] is chunk and reading[1].done()

    def source(self, chunk: Chunk) -> Iterable[tuple[Tensor, Region]]:
        reading = self._reads.get(chunk.slot)
        if reading is not None and reading[0] is not chunk:
            reading[1].wait()
        self.prepare(chunk)
        self._reads[chunk.slot][1].result()
        del self._reads[chunk.slot]
        room = self._room("in", chunk)
        return [(room[r.offset : r.offset + r.nbytes], r) for r in chunk.regions]

    def sent(self, chunk: Chunk, event: Any) -> None:
        if event is not None:
            self._sent[chunk.slot] = event

    def forget(self) -> None:
        for _, reading in self._reads.values():
            reading.wait()
        self._reads.clear()

    def reserve(self, chunk: Chunk) -> None:
        before = self._sinks.get(chunk.slot)
        if before is not None:
            before.result()
            del self._sinks[chunk.slot]

    def sink(self, chunk: Chunk) -> Iterable[tuple[Tensor, Region]]:
        self.reserve(chunk)
        room = self._room("out", chunk)
        return [(room[r.offset : r.offset + r.nbytes], r) for r in chunk.regions]

    def stored(self, chunk: Chunk) -> None:
        room, start, file = self._room("out", chunk), chunk.memory.offset, self._file
        event, regions, shown = chunk.stored, chunk.regions, self._written

        def write() -> None:
            if shown is not None:
                # until then, the manifest on the disk names what this is written over
                shown.result()
            if event is not None:
                event.synchronize()
            for region in regions:
                inside = room[region.offset : region.offset + region.nbytes]
                _write(file, inside, start + region.start)

        self._sinks[chunk.slot] = self._writes[chunk] = Task(self._pool, write)

    def wait(self) -> None:
        for _, reading in self._reads.values():
            reading.wait()
        for task in (*self._writes.values(), self._written):
            if task is not None:
                task.result()
        self._writes.clear()

    def commit(self, describe: Callable[[], dict[str, Any]]) -> None:
        content = describe()
        self.protect(content.pop("memories"))
        counts = content.pop("counts")
        tasks = [task for task in (*self._writes.values(), self._written) if task is not None]
        if self.groups is not None:
            content["param_groups"] = self.groups.take()
        self._said = content = {"id": self._id, "bytes": self._end, **content}
        file, path, sync = self._file, self.manifest_path, self.sync

        def keep() -> None:
            for task in tasks:
                task.result()
            for entry, count in zip(content["parameters"], counts(), strict=True):
                entry["step"] = count
            if sync:
                os.fsync(file)
            write_manifest(path, content, sync)

        self._written = Task(self._pool, keep)

    def restate(self) -> bool:
        if self._file < 0 or self._owner != os.getpid() or not self._outdated:
            return False
        content, before = self._again_said(), self._written
        path, sync = self.manifest_path, self.sync

        def keep() -> None:
            if before is not None:
                before.result()
            write_manifest(path, content, sync)

        self._written = Task(self._pool, keep)
        return True

    def supersede(self) -> None:
        if self.groups is not None:
            self.groups.forget()

    @property
    def _outdated(self) -> bool:
        """Whether there is a manifest, and groups hold other values than it says."""
        return self._said is not None and self.groups is not None and self.groups.changed()

    def _again_said(self) -> dict[str, Any]:
        """What the manifest says, with the values that groups hold now."""
        assert self._said is not None
        assert self.groups is not None
        self._said = {**self._said, "param_groups": self.groups.take()}
        return self._said

    def close(self, remove: bool = False) -> None:
        """Write what is under way, and let go of the file, which can be removed."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        if self._owner != os.getpid():
            # a process that was forked has neither the threads nor the lock
            os.close(file)
            return
        last: Callable[[], object] | None = None
        # whoever collects garbage is not to wait for a device
        if not remove and self._outdated and self.groups and not self.groups.on_device:
            last = partial(write_manifest, self.manifest_path, self._again_said(), self.sync)
        writes = list(self._writes.values())
        given = (file, self._pool, writes, self._written, last, self.path if remove else None)
        if current_thread().name.startswith(NAME):
            # the collector of garbage came by on a thread of this very pool, which cannot await it
            Thread(target=_let_go, args=given).start()
        else:
            _let_go(*given)

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0 and hasattr(self, "_pool"):
            self.close()


@atexit.register
def _close_all() -> None:
    for place in list(_open):
        place.close()


def _let_go(
    file: int,
    pool: ThreadPoolExecutor,
    writes: Sequence[Task],
    manifest: Task | None,
    last: Callable[[], object] | None,
    remove: Path | None,
) -> None:
    """Let go of a file after all that is under way, and after ``last`` if there is a manifest."""
    pool.shutdown()
    for task in (*writes, manifest):
        if task is not None and task.failed:
            # it has been raised before, or nobody asks any more; what is named is whole
            with suppress(Exception):
                task.result()
    if last is not None and (manifest is None or not manifest.failed):
        with suppress(OSError):
            last()
    if remove is not None:
        remove.unlink(missing_ok=True)
    # what is mapped holds the file, and so would the lock
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _read(file: int, into: Tensor, offset: int) -> None:
    data: Any = memoryview(into.numpy())  # type: ignore[arg-type]
    while data:
        count = os.preadv(file, [data], offset)
        if count == 0:
            raise OSError(f"the file of the state is cut off: nothing at byte {offset}")
        data, offset = data[count:], offset + count


def _write(file: int, of: Tensor, offset: int) -> None:
    data: Any = memoryview(of.numpy())  # type: ignore[arg-type]
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count
