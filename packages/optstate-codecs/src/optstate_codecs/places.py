"""The former name of ``optstate_codecs.offloading``."""

from optstate_codecs.offloading import Offload, Snapshot, offload, snapshot, synchronize

__all__ = ["Offload", "Snapshot", "offload", "snapshot", "synchronize"]
