"""What the tests share: optimizers to wrap, a problem to step them on, and ``host_nets``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate_codecs.testing.subject import normal
from optstate_codecs.triton_lib import HAS_TRITON, INTERPRETED

sys.path.insert(0, str(Path(__file__).parent))

# `pytest --hypothesis-profile=thorough packages/optstate-wrap` runs a thousand random sequences
settings.register_profile("thorough", max_examples=1000)

SHAPES = ((40, 33), (), (1,), (700,), (3, 5, 31), (0, 4), (16, 16))

#: configurations that the probe has to accept; those that it may not split have False
CONFIGURATIONS: dict[str, tuple[type[Optimizer], dict[str, Any], bool]] = {
    "Adadelta": (torch.optim.Adadelta, {}, True),
    "Adagrad": (torch.optim.Adagrad, {}, True),
    "Adam": (torch.optim.Adam, {}, True),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}, True),
    "Adam foreach": (torch.optim.Adam, {"foreach": True}, True),
    "AdamW": (torch.optim.AdamW, {}, True),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}, True),
    "AdamW maximize": (torch.optim.AdamW, {"maximize": True}, True),
    "Adamax": (torch.optim.Adamax, {}, True),
    "ASGD": (torch.optim.ASGD, {}, True),
    "NAdam": (torch.optim.NAdam, {}, True),
    "RAdam": (torch.optim.RAdam, {}, True),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, True),
    "Rprop": (torch.optim.Rprop, {}, True),
    "SGD": (torch.optim.SGD, {}, True),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, True),
    "SGD fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}, True),
    "Adafactor": (torch.optim.Adafactor, {}, False),
}


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.node.get_closest_marker("interpret") and not (HAS_TRITON and INTERPRETED):
        pytest.skip("needs triton and TRITON_INTERPRET=1")


@pytest.fixture(params=[False, True], ids=["kept", "offloaded"])
def offload(request: pytest.FixtureRequest) -> bool:
    """Whether gradients are offloaded."""
    return request.param


@pytest.fixture(params=CONFIGURATIONS, ids=lambda name: name.replace(" ", "-"))
def configuration(request: pytest.FixtureRequest) -> tuple[type[Optimizer], dict[str, Any], bool]:
    return CONFIGURATIONS[request.param]


@dataclass
class Problem:
    """Parameters in two groups, and gradients that come and go: the same for the same steps."""

    make: Callable[[Any], Optimizer]
    dtype: torch.dtype = torch.float32
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    step: int = 0
    late: bool = True
    params: list[Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [Parameter(normal(shape, generator).to(self.dtype)) for shape in self.shapes]
        half = len(self.params) // 2
        groups = [{"params": self.params[:half]}]
        if self.params[half:]:
            groups.append({"params": self.params[half:], "lr": 3e-3})
        self.optimizer = self.make(groups)
        if isinstance(getattr(self.optimizer, "inner", self.optimizer), torch.optim.Adafactor):
            # torch's divides by the number of elements
            for group in self.optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p.numel()]
        inner = getattr(self.optimizer, "inner", self.optimizer)
        self.late = not (isinstance(inner, torch.optim.SGD) and inner.defaults["fused"])

    def set_gradients(self) -> None:
        generator = torch.Generator().manual_seed(100 + self.step)
        for number, param in enumerate(self.params):
            noise = normal(param.shape, generator).to(self.dtype)
            # torch's fused SGD cannot start one parameter later than another
            missing = (self.step + number) % 5 == 3 and (self.step > 0 or self.late)
            param.grad = None if missing else noise
        self.step += 1

    def run(self, steps: int) -> Problem:
        for _ in range(steps):
            self.set_gradients()
            self.optimizer.step()
        return self

    def tensors(self) -> dict[str, Any]:
        """Parameters and decoded state, to compare."""
        found: dict[str, Any] = {}
        for number, param in enumerate(self.params):
            found[f"parameter {number}"] = param.detach().clone()
            for key, value in self.optimizer.state.get(param, {}).items():
                found[f"{key} of {number}"] = value.clone() if torch.is_tensor(value) else value
        return found


def assert_same(left: Problem, right: Problem) -> None:
    """Every bit of parameters and state, and every dtype, is the same."""
    ours, theirs = left.tensors(), right.tensors()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert value.dtype == theirs[name].dtype, name
            assert value.shape == theirs[name].shape, name
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name], name
    for a, b in zip(left.optimizer.param_groups, right.optimizer.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }


@pytest.fixture
def same() -> Callable[[Problem, Problem], None]:
    return assert_same


@pytest.fixture
def problem() -> type[Problem]:
    return Problem
