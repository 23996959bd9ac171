"""A store that keeps state in a file on disk, with a manifest that makes it a checkpoint.

Threads read and write the file. Every slab has two memories in it. A step writes to those that the
manifest does not name. When all of them are written, a new manifest replaces the old one by a
single rename. So the manifest always names one complete step, wherever the process is killed.
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

from optstate_codecs.files import open_regular
from optstate_codecs.offloading.group_values import GroupValues
from optstate_codecs.offloading.manifest import (
    HEADER,
    manifest_path,
    read_manifest,
    write_manifest,
)
from optstate_codecs.offloading.mapped import GRANULARITY, mapped
from optstate_codecs.offloading.pinned import empty_pinned
from optstate_codecs.offloading.slabs import Chunk, Memory, Region, Slab
from optstate_codecs.offloading.store import StateStore
from optstate_codecs.offloading.tasks import Task

__all__ = ["DiskStateStore"]

# closed at process exit, when no garbage is collected
_open: WeakSet[DiskStateStore] = WeakSet()
THREADS = 4
NAME = "optstate-disk"


class DiskStateStore(StateStore):
    """Keeps state in a preallocated file; ``PATH.json`` is the manifest of the last complete step.

    Args:
        path: the file, which is created.
        resume: continue from an existing file and its manifest.
        sync: flush every step to the disk before its manifest, so that it also survives a loss of
            power; slow.

    Attributes:
        manifest: with ``resume``, the manifest as it was read; else None.
        groups: the param group values to keep in the manifest, or None.

    Raises:
        FileExistsError: the file exists, and ``resume`` is False.
        FileNotFoundError: ``resume`` is True, and the file or its manifest is missing.
        ValueError: the manifest is invalid or another file's, or the file is truncated.
        OSError: another process uses the file, the disk is full, or the file or its manifest is a
            symbolic link or no regular file.
    """

    name = "disk"

    def __init__(self, path: str | Path, resume: bool = False, sync: bool = False) -> None:
        super().__init__()
        # absolute: the process may change its working directory before the next manifest
        self.path = Path(path).absolute()
        self.manifest_path = manifest_path(self.path)
        self.sync = sync
        self.manifest: dict[str, Any] | None = None
        self.groups: GroupValues | None = None
        # the content of the last manifest that was written or will be
        self._content: dict[str, Any] | None = None
        self._protected: set[int] = set()
        self._reads: dict[int, tuple[Chunk, Task]] = {}
        # the last write of each chunk, and of each slot
        self._writes: dict[Chunk, Task] = {}
        self._sinks: dict[int, Task] = {}
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._sent: dict[int, Any] = {}
        self._written: Task | None = None
        flags = os.O_RDWR if resume else os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            self._file = open_regular(self.path, flags, 0o644)
        except FileExistsError as error:
            raise FileExistsError(
                f"path={str(self.path)!r}: there already; use resume=True to go on from it, or "
                "remove it and its manifest"
            ) from error
        self._pool = ThreadPoolExecutor(THREADS, NAME)
        _open.add(self)
        try:
            self._lock()
            if resume:
                self.manifest = self._content = read_manifest(self.manifest_path)
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
        """Extend the file; returns where the new bytes begin."""
        start, size = self._end, -(-nbytes // GRANULARITY) * GRANULARITY
        if size:
            try:
                os.posix_fallocate(self._file, start, size)
            except OSError as error:
                with suppress(OSError):  # the bytes that were allocated
                    os.ftruncate(self._file, start)
                raise OSError(
                    error.errno, f"{self.path}: no room for {size} more bytes: {error.strerror}"
                ) from error
        self._end = start + size
        return start

    def new(self, nbytes: int) -> Memory:
        return self.mapped(self._grow(nbytes), nbytes)

    def mapped(self, offset: int, nbytes: int) -> Memory:
        """Bytes of the file, from ``offset`` on, as memory.

        Raises:
            ValueError: they are not all in the file.
        """
        if offset % GRANULARITY or not 0 <= offset <= offset + nbytes <= self._end:
            raise ValueError(f"{self.manifest_path}: a slab of {nbytes} bytes at byte {offset}")
        return Memory(mapped(self._file, offset, nbytes), offset)

    def allocate(self, nbytes: int) -> Slab:
        before = self._end
        try:
            slab = super().allocate(nbytes)
            # the second memory now, so that a full disk is noticed before a step, not during it
            slab.family.append(self.new(nbytes))
        except OSError:
            # nothing of it is in use: the next attempt should find as much space
            with suppress(OSError):
                os.ftruncate(self._file, before)
                self._end = before
            raise
        return slab

    def writable(self, memory: Memory) -> bool:
        return super().writable(memory) and id(memory) not in self._protected

    def protect(self, memories: Iterable[Memory]) -> None:
        self._protected = set(map(id, memories))

    def check(self) -> None:
        self._check_size(self._end)
        # retry failed writes, before a step adds more
        for task in (*self._writes.values(), self._written):
            if task is not None and task.failed:
                task.result()

    def _buffer(self, kind: str, chunk: Chunk) -> Tensor:
        """The host memory between the file and a slot's chunks, ``kind`` "in" or "out"."""
        buffer = self._buffers.get((kind, chunk.slot))
        if buffer is None or buffer.numel() < chunk.nbytes:
            buffer = empty_pinned(chunk.nbytes, torch.cuda.is_available())
            self._buffers[kind, chunk.slot] = buffer
        return buffer

    def prepare(self, chunk: Chunk) -> None:
        reading = self._reads.get(chunk.slot)
        if reading is not None and (reading[0] is chunk or not reading[1].done()):
            return
        # no reference to the store, which a thread must not be the last to hold
        buffer, written, file = self._buffer("in", chunk), self._writes.get(chunk), self._file
        event, regions, start = self._sent.pop(chunk.slot, None), chunk.regions, chunk.memory.offset

        def read() -> None:
            if written is not None:
                written.result()
            if event is not None:
                event.synchronize()
            for region in regions:
                inside = buffer[region.offset : region.offset + region.nbytes]
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
        buffer = self._buffer("in", chunk)
        return [(buffer[r.offset : r.offset + r.nbytes], r) for r in chunk.regions]

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
        buffer = self._buffer("out", chunk)
        return [(buffer[r.offset : r.offset + r.nbytes], r) for r in chunk.regions]

    def stored(self, chunk: Chunk) -> None:
        buffer, start, file = self._buffer("out", chunk), chunk.memory.offset, self._file
        event, regions, manifest = chunk.stored, chunk.regions, self._written

        def write() -> None:
            if manifest is not None:
                # until then, the manifest on the disk names the memory that this overwrites
                manifest.result()
            if event is not None:
                event.synchronize()
            for region in regions:
                inside = buffer[region.offset : region.offset + region.nbytes]
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
        self._content = content = {"id": self._id, "bytes": self._end, **content}
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
        if self._file < 0 or self.process != os.getpid() or not self._outdated:
            return False
        content, before = self._updated_content(), self._written
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
        """Whether there is a manifest with other group values than the present ones."""
        return self._content is not None and self.groups is not None and self.groups.changed()

    def _updated_content(self) -> dict[str, Any]:
        """The manifest's content with the present group values."""
        assert self._content is not None
        assert self.groups is not None
        self._content = {**self._content, "param_groups": self.groups.take()}
        return self._content

    def close(self, remove: bool = False) -> None:
        """Finish writes that are under way, and close the file, or remove it."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        if self.process != os.getpid():
            # a forked process has neither the threads nor the lock
            os.close(file)
            return
        last: Callable[[], object] | None = None
        # the garbage collector may call this, and must not wait for a device
        if not remove and self._outdated and self.groups and not self.groups.on_device:
            last = partial(write_manifest, self.manifest_path, self._updated_content(), self.sync)
        writes = list(self._writes.values())
        given = (file, self._pool, writes, self._written, last, self.path if remove else None)
        if current_thread().name.startswith(NAME):
            # the garbage collector runs on a thread of this pool, which cannot wait for itself
            Thread(target=_finish, args=given).start()
        else:
            _finish(*given)

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0 and hasattr(self, "_pool"):
            self.close()


@atexit.register
def _close_all() -> None:
    for store in list(_open):
        store.close()


def _finish(
    file: int,
    pool: ThreadPoolExecutor,
    writes: Sequence[Task],
    manifest: Task | None,
    last: Callable[[], object] | None,
    remove: Path | None,
) -> None:
    """Close a file after all writes, and after ``last`` unless writing the manifest failed."""
    pool.shutdown()
    for task in (*writes, manifest):
        if task is not None and task.failed:
            # the error was raised before; the old manifest is still valid
            with suppress(Exception):
                task.result()
    if last is not None and (manifest is None or not manifest.failed):
        with suppress(OSError):
            last()
    if remove is not None:
        remove.unlink(missing_ok=True)
    # mapped regions keep the file open, and would keep the lock
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
