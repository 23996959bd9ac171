"""Law 8: training resumed from a checkpoint equals training without a stop."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch

from optstate_codecs.testing.subject import Subject, assert_same

__all__ = ["resume"]


def _reloaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def resume(subject: Subject) -> None:
    """Law 8: to save, load and continue equals never having stopped, bit for bit.

    Through ``torch.save``, ``pickle`` and ``deepcopy``, with torch's own generator seeded
    differently in between.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        whole = subject.trainer().run(9)
        torch.manual_seed(2)
        first = subject.trainer().run(4)
        saved = _reloaded(first.optimizer.state_dict())
        copies = {"deepcopy": copy.deepcopy(first), "pickle": pickle.loads(pickle.dumps(first))}
        torch.manual_seed(3)
        second = subject.trainer()
        for ours, theirs in zip(second.params, first.params, strict=True):
            ours.data.copy_(theirs.data)
        second.time = first.time
        groups = [id(group) for group in second.optimizer.param_groups]
        second.optimizer.load_state_dict(saved)
        if groups != [id(group) for group in second.optimizer.param_groups]:
            raise AssertionError("resume: load_state_dict replaced the param groups")
        first.run(3)  # loaded state must not alias the state dict
        for name, trainer in {"state dict": second, **copies}.items():
            trainer.run(5)
            assert_same(f"resume, {name}", whole.tensors(), trainer.tensors())
