"""Where state lives while it is not stepped: host memory or a file, and how a step streams it."""

from optstate_codecs.places.base import HostPlace, Place
from optstate_codecs.places.offload import STORES, Offload, offload, synchronize
from optstate_codecs.places.snapshot import Snapshot, snapshot
from optstate_codecs.places.stream import CHUNK_BYTES, Stream

__all__ = [
    "CHUNK_BYTES",
    "STORES",
    "HostPlace",
    "Offload",
    "Place",
    "Snapshot",
    "Stream",
    "offload",
    "snapshot",
    "synchronize",
]
