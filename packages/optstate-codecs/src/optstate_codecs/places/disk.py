"""State in a file: positional reads and writes on threads, and a manifest that is written last.

Every slab has two places in the file. A step writes to the one that the manifest does not name, and
when all of it is written a new manifest takes the place of the old one in a single renaming: what
the manifest names is always one whole step, wherever the process is killed.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakMethod

import torch
from torch import Tensor

from optstate_codecs.places.base import Place
from optstate_codecs.places.pinned import empty_pinned
from optstate_codecs.places.slabs import Chunk, Memory, Region, Slab

__all__ = ["DiskPlace"]

VERSION = 1
# the file begins with what says which manifest is its own
HEADER = 4096
THREADS = 4


class DiskPlace(Place):
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
        self.sync = sync
        self.manifest: dict[str, Any] | None = None
        self._shown: set[int] = set()
        self._reads: dict[int, tuple[Chunk, Future[None]]] = {}
        self._writes: dict[Chunk, Future[None]] = {}
        self._rooms: dict[tuple[str, int], Tensor] = {}
        self._sent: dict[int, Any] = {}
        self._sinks: dict[int, Future[None]] = {}
        self._written: Future[None] | None = None
        self._describe: WeakMethod[Callable[[], dict[str, Any]]] | None = None
        flags = os.O_RDWR if resume else os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            self._file = os.open(self.path, flags, 0o644)
        except FileExistsError as error:
            raise FileExistsError(
                f"path={str(self.path)!r}: there already; use resume=True to go on from it, or "
                "remove it and its manifest"
            ) from error
        self._pool = ThreadPoolExecutor(THREADS, "optstate-disk")
        try:
            self._lock()
            if resume:
                self._end = HEADER
                self.manifest = self._read_manifest()
                self._id, self._end = self.manifest["id"], self.manifest["bytes"]
            else:
                self._id, self._end = uuid4().hex, 0
                self._grow(HEADER)
                os.pwrite(self._file, self._id.encode(), 0)
        except BaseException:
            self.close()
            raise

    @property
    def manifest_path(self) -> Path:
        """Of the manifest."""
        return self.path.with_name(self.path.name + ".json")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(
                f"path={str(self.path)!r}: in use by another optimizer or process"
            ) from error

    def _read_manifest(self) -> dict[str, Any]:
        path = self.manifest_path
        try:
            manifest = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path}: missing; no step was completed, so there is nothing to resume from"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: not a manifest: {error}") from error
        keys = {"version", "id", "bytes", "slabs", "parameters", "param_groups", "chunk_bytes"}
        if not isinstance(manifest, dict) or keys - manifest.keys():
            raise ValueError(f"{path}: not a manifest, which has {', '.join(sorted(keys))}")
        if manifest["version"] != VERSION:
            raise ValueError(f"{path}: version {manifest['version']!r}, must be {VERSION}")
        if os.pread(self._file, 32, 0) != str(manifest["id"]).encode():
            raise ValueError(f"{path}: the manifest of another file than {self.path}")
        self._check_size(manifest["bytes"])
        return manifest

    def _check_size(self, nbytes: int) -> None:
        found = os.fstat(self._file).st_size
        if found < nbytes:
            raise ValueError(f"{self.path}: cut off: {found} bytes, must be {nbytes}")

    def _grow(self, nbytes: int) -> int:
        """Take more of the disk; where it begins."""
        start, size = self._end, -(-nbytes // mmap.ALLOCATIONGRANULARITY)
        size *= mmap.ALLOCATIONGRANULARITY
        try:
            os.posix_fallocate(self._file, start, size)
        except OSError as error:
            raise OSError(
                error.errno, f"{self.path}: no room for {size} more bytes: {error.strerror}"
            ) from error
        self._end = start + size
        return start

    def new(self, nbytes: int) -> Memory:
        return self.mapped(self._grow(nbytes), nbytes)

    def mapped(self, offset: int, nbytes: int) -> Memory:
        """What is in the file from ``offset`` on."""
        if nbytes == 0:
            return Memory(torch.empty(0, dtype=torch.uint8), offset)
        region = mmap.mmap(self._file, nbytes, offset=offset)
        return Memory(torch.frombuffer(region, dtype=torch.uint8), offset)

    def allocate(self, nbytes: int) -> Slab:
        slab = super().allocate(nbytes)
        # the second memory now: a full disk is to be found before a step, not in it
        slab.family.append(self.new(nbytes))
        return slab

    def writable(self, memory: Memory) -> bool:
        return super().writable(memory) and id(memory) not in self._shown

    def show(self, memories: Iterable[Memory]) -> None:
        """The manifest names these."""
        self._shown = set(map(id, memories))

    def check(self) -> None:
        self._check_size(self._end)
        if self._written is not None and self._written.done() and self._written.exception():
            # what is there now must be named before a step may write over what was there before
            self._written = None
            describe = None if self._describe is None else self._describe()
            assert describe is not None
            self.commit(describe)
            self.wait()

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
        room, written, sent = self._room("in", chunk), self._writes.get(chunk), chunk.slot
        event, memory = self._sent.pop(sent, None), chunk.memory

        def read() -> None:
            if written is not None:
                written.result()
            if event is not None:
                event.synchronize()
            for region in chunk.regions:
                self._read(
                    room[region.offset : region.offset + region.nbytes],
                    memory.offset + region.start,
                )

        self._reads[chunk.slot] = chunk, self._pool.submit(read)

    def _read(self, into: Tensor, offset: int) -> None:
        data: Any = memoryview(into.numpy())  # type: ignore[arg-type]
        while data:
            count = os.preadv(self._file, [data], offset)
            if count == 0:
                raise OSError(f"{self.path}: cut off: nothing at byte {offset}")
            data, offset = data[count:], offset + count

    def ready(self, chunk: Chunk) -> bool:
        reading = self._reads.get(chunk.slot)
        return reading is not None and reading[0] is chunk and reading[1].done()

    def source(self, chunk: Chunk) -> Iterable[tuple[Tensor, Region]]:
        reading = self._reads.get(chunk.slot)
        if reading is not None and reading[0] is not chunk:
            wait([reading[1]])
        self.prepare(chunk)
        _, future = self._reads[chunk.slot]
        try:
            future.result()
        finally:
            del self._reads[chunk.slot]
        room = self._room("in", chunk)
        return [(room[r.offset : r.offset + r.nbytes], r) for r in chunk.regions]

    def sent(self, chunk: Chunk, event: Any) -> None:
        if event is not None:
            self._sent[chunk.slot] = event

    def forget(self, chunk: Chunk) -> None:
        reading = self._reads.get(chunk.slot)
        if reading is not None and reading[0] is chunk:
            wait([reading[1]])
            del self._reads[chunk.slot]

    def sink(self, chunk: Chunk) -> Iterable[tuple[Tensor, Region]]:
        before = self._sinks.pop(chunk.slot, None)
        if before is not None:
            before.result()
        room = self._room("out", chunk)
        return [(room[r.offset : r.offset + r.nbytes], r) for r in chunk.regions]

    def stored(self, chunk: Chunk) -> None:
        room, memory, event = self._room("out", chunk), chunk.memory, chunk.stored
        shown = self._written

        def write() -> None:
            if shown is not None:
                # until then, the manifest on the disk names what this is written over
                shown.result()
            if event is not None:
                event.synchronize()
            for region in chunk.regions:
                self._write(
                    room[region.offset : region.offset + region.nbytes],
                    memory.offset + region.start,
                )

        self._sinks[chunk.slot] = self._writes[chunk] = self._pool.submit(write)

    def _write(self, of: Tensor, offset: int) -> None:
        data: Any = memoryview(of.numpy())  # type: ignore[arg-type]
        while data:
            count = os.pwrite(self._file, data, offset)
            data, offset = data[count:], offset + count

    def wait(self) -> None:
        pending = [*self._writes.values(), *(future for _, future in self._reads.values())]
        if self._written is not None:
            pending.append(self._written)
        wait(pending)
        for future in self._writes.values():
            future.result()
        if self._written is not None:
            self._written.result()
        self._writes.clear()

    def commit(self, describe: Callable[[], dict[str, Any]]) -> None:
        content, self._describe = describe(), WeakMethod(describe)
        self.show(content.pop("memories"))
        counts = content.pop("counts")
        writes, before, nbytes = list(self._writes.values()), self._written, self._end

        def keep() -> None:
            for future in (*writes, before):
                if future is not None:
                    future.result()
            for entry, count in zip(content["parameters"], counts(), strict=True):
                entry["step"] = count
            manifest = {"version": VERSION, "id": self._id, "bytes": nbytes, **content}
            if self.sync:
                os.fsync(self._file)
            scratch = self.manifest_path.with_name(self.manifest_path.name + ".new")
            with scratch.open("w") as file:
                json.dump(manifest, file)
                file.flush()
                if self.sync:
                    os.fsync(file.fileno())
            scratch.replace(self.manifest_path)

        self._written = self._pool.submit(keep)

    def close(self) -> None:
        """Write what is under way, and let go of the file."""
        if self._file >= 0:
            self._pool.shutdown()
            # what is mapped holds the file, and so would the lock
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0 and hasattr(self, "_pool"):
            self.close()
