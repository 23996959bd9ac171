"""The interface of an optimizer that saving, loading and counting its state require."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from optstate_codecs.engine.executor import Executor
from optstate_codecs.engine.request import ParamStep
from optstate_codecs.formats import Format
from optstate_codecs.rules import Rule

__all__ = ["OffloadOptions", "StateOwner"]


class OffloadOptions(Protocol):
    """How an optimizer's state is offloaded, see ``optstate_codecs.offload``."""

    @property
    def store(self) -> str: ...
    def again(self, optimizer: Any) -> None:
        """Offload the state of a copy of the optimizer likewise."""


class StateOwner(Protocol):
    """An optimizer with coded state; ``CodedOptimizer`` documents the members."""

    rule: Rule
    write: str
    param_groups: list[dict[str, Any]]
    executor: Executor

    @property
    def storage_options(self) -> tuple[str, ...]: ...
    @property
    def state(self) -> Any: ...
    @property
    def state_device(self) -> torch.device | None: ...
    def group_formats(self, group: Mapping[str, Any]) -> dict[str, Format]: ...
    def check_group(self, group: dict[str, Any]) -> None: ...
    def stored_param_steps(self, params: Collection[Tensor] | None = None) -> list[ParamStep]: ...
