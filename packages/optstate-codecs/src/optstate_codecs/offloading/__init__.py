"""Offload optimizer state to host memory or a file, and step it in chunks on the device."""

from optstate_codecs.offloading.classes import offloaded_class
from optstate_codecs.offloading.offload import STORES, Offload, offload, synchronize
from optstate_codecs.offloading.placement import CHUNK_BYTES, Placement
from optstate_codecs.offloading.snapshot import Snapshot, snapshot
from optstate_codecs.offloading.store import HostStateStore, StateStore
from optstate_codecs.offloading.streaming import StreamingExecutor

__all__ = [
    "CHUNK_BYTES",
    "STORES",
    "HostStateStore",
    "Offload",
    "Placement",
    "Snapshot",
    "StateStore",
    "StreamingExecutor",
    "offload",
    "offloaded_class",
    "snapshot",
    "synchronize",
]
