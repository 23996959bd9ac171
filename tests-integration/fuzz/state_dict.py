"""Target: ``load_state_dict`` of an optimizer of the family and of a wrapped one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import contract
import torch
from edits import Choices, edited, tensors
from torch.nn import Parameter

from optstate_codecs import Adam, CodedOptimizer
from optstate_wrap import ConfigurablePolicy, wrap

SHAPES = ((4, 30), (7,), (), (3, 64))
SIGNED = ("dynamic8", "costate(bits=3)", "int4(units=update)", "fp32", "int8")
UNSIGNED = (
    *("dynamic8(signed=False)", "oneq(bits=3)", "linear4(normalization=rank1)", "fp32"),
    "linear4",
)


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def coded(first: str, second: str) -> Callable[[Any], Any]:
    formats = {"exp_avg": first, "exp_avg_sq": second, "max_exp_avg_sq": second}
    return lambda groups: CodedOptimizer(groups, Adam(), formats, lr=0.02, backend="eager")


def wrapped(packed: bool) -> Callable[[Any], Any]:
    def make(groups: Any) -> Any:
        codecs = {"exp_avg": "int8(units=update)", "exp_avg_sq": "dynamic8(signed=False)"}
        inner = torch.optim.AdamW(groups, lr=0.02)
        return wrap(inner, ConfigurablePolicy(codecs), packed_checkpoints=packed)

    return make


KNOWN = {"step", "exp_avg", "exp_avg_sq", "parts"}
KINDS = (
    *(coded(*formats) for formats in zip(SIGNED, UNSIGNED, strict=True)),
    wrapped(False),
    wrapped(True),
)


class Target:
    """``one`` loads a state dict with edits that the bytes decide."""

    name = "state_dict"

    def __init__(self) -> None:
        self.saved, self.expected = [], []
        for make in KINDS:
            params, optimizer = self._made(make)
            for seed in range(2):
                contract.gradients(params, seed)
                optimizer.step()
            saved = optimizer.state_dict()
            again, other = self._made(make)
            other.load_state_dict(saved)
            contract.steps(again, other)
            self.saved.append(saved)
            self.expected.append({n: contract.bits(p) for n, p in enumerate(again)})
        self.refused = self.loaded = 0
        # used again after an input that was refused, which has not changed them
        self.ready: dict[int, tuple[list[Parameter], Any]] = {}

    @staticmethod
    def _made(make: Callable[[Any], Any]) -> tuple[list[Parameter], Any]:
        params = parameters()
        return params, make([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}])

    def seeds(self) -> list[bytes]:
        """Inputs to begin with: each kind with single edits at many places."""
        return [
            bytes([kind, 0, at, how, at, at])
            for kind in range(len(KINDS))
            for at in range(0, 80, 3)
            for how in (0, 1, 2, 3, 6)
        ]

    def one(self, data: bytes) -> None:
        """Load the state dict that ``data`` stands for.

        Raises:
            contract.Violation: the contract is broken.
        """
        choices = Choices(data)
        kind = choices.below(len(KINDS))
        saved = self.saved[kind]
        try:
            content, changed = edited(saved, choices, tensors)
        except (RuntimeError, TypeError):
            # there is no such tensor
            return
        params, optimizer = self.ready.pop(kind, None) or self._made(KINDS[kind])
        if contract.refused(lambda: optimizer.load_state_dict(content), optimizer):
            self.refused += 1
            self.ready[kind] = params, optimizer
            return
        # a wrapped optimizer has hyper-parameters that only its own step can judge, and state that
        # only others know is kept for them
        states = content.get("state", {}).values()
        others = [s for s in states if isinstance(s, dict) and s and not KNOWN & set(s)]
        groups = any(path[0] == "param_groups" for path in changed)
        judged = kind >= len(SIGNED) and bool(groups or others)
        contract.steps(params, optimizer, whole=not judged)
        self.loaded += 1
        if all(len(path) > 2 and path[0] == "state" for path in changed):
            touched = {path[1] for path in changed}
            contract.check_untouched(params, self.expected[kind], touched)
