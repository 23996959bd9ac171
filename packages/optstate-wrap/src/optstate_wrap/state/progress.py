"""The progress in a state dict of a wrapped optimizer: steps taken, and the policy's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optstate_codecs.counts import checked_count
from optstate_wrap.policies import Policy
from optstate_wrap.state.checkpoint import KEY

__all__ = ["checked_progress", "load_policy", "steps_of"]


def checked_progress(given: Any) -> Mapping[str, Any]:
    """The progress in a state dict, with the type of each entry checked."""
    where = f"state_dict[{KEY!r}]"
    if not isinstance(given, Mapping):
        raise TypeError(f"{where}={given!r:.80}: must be a dict, got {type(given).__name__}")
    for key, kind in (("steps", int), ("policy", Mapping), ("foreign", Mapping)):
        if key in given and not isinstance(given[key], kind):
            must = "an int" if kind is int else "a dict"
            raise TypeError(f"{where}[{key!r}]={given[key]!r:.80}: must be {must}")
    if not 0 <= given.get("steps", 0) < 2**63:
        raise ValueError(f"{where}['steps']={given['steps']}: must be from 0 to 2**63 - 1")
    progress: Mapping[str, Any] = given
    return progress


def load_policy(policy: Policy, progress: Mapping[str, Any]) -> None:
    """Restore a policy's progress; errors name its place in the state dict."""
    where = f"state_dict[{KEY!r}]['policy']"
    try:
        policy.load_state_dict(progress)
    except KeyError as error:
        raise KeyError(f"{where}: missing key {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error


def steps_of(state: Mapping[Any, Any]) -> int:
    """The largest step count in a plain state dict."""
    counts = [0]
    for number, entry in state.items():
        if isinstance(entry, Mapping) and isinstance(entry.get("step"), (int, float, Tensor)):
            where = f"state_dict['state'][{number!r}]['step']"
            counts.append(int(checked_count(where, entry["step"])))
    return max(counts)
