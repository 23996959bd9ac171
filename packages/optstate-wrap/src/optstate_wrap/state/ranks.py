"""Packed state of ``DTensor``s that each worker saves for itself, and that only it may load.

Such a state is under a key that has the worker's rank and the number of workers. Two workers have
no key in common, so ``torch.distributed.checkpoint`` does not take one's state for the other's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["of_this_rank", "rank_key"]

PATTERN = re.compile(r"rank (\d+) of (\d+)")


def rank_key() -> str:
    """The key of this worker's state, such as "rank 0 of 2"."""
    import torch.distributed as dist

    ready = dist.is_available() and dist.is_initialized()
    return f"rank {dist.get_rank()} of {dist.get_world_size()}" if ready else "rank 0 of 1"


def of_this_rank(where: str, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """This worker's part of the packed state of a parameter; a state of all workers itself.

    Raises:
        ValueError: another worker saved the state, or another number of workers did.
    """
    saved = [key for key in state if isinstance(key, str) and PATTERN.fullmatch(key)]
    if not saved:
        return state
    own = rank_key()
    if own not in state:
        raise ValueError(
            f"{where}: was saved by {' and '.join(map(repr, saved))} with per_rank=True, must be "
            f"loaded by the same, not by {own!r}; for other workers, save state_dict()"
        )
    part: Mapping[str, Any] = state[own]
    return part
