"""Random sequences of what people do with an optimizer, as a state machine of hypothesis.

Two optimizers of one class step equal parameters. What changes the training (a step, a rate, a new
group) is done to both. What must not change it (saving and loading, offloading, copying, releasing
gradients) is done to the first only. After each of these, every bit of both is the same.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs import (
    CodedOptimizer,
    GradientRelease,
    load_safetensors,
    offload,
    save_safetensors,
    snapshot,
)
from optstate_codecs.testing import tensors_in

__all__ = ["Sequences", "Subject"]

SHAPES = ((17, 31), (5,), (600,), ())
SIZES = st.sampled_from([(), (3,), (9, 31), (600,), (0,)])
NUMBERS = st.integers(0, 5)
FILES = itertools.count()


@dataclass(frozen=True)
class Subject:
    """An optimizer, and what is known to give its bits.

    Attributes:
        make: builds it from parameters or groups.
        twin: builds the second one, which is never saved, offloaded or copied.
        others: the same with state in other formats; loading converts.
        torch_class: of ``torch.optim``, that state dicts are converted to and from.
        dtypes: of the parameters.
        exact: whether the twin is torch's.
    """

    make: Callable[..., Any]
    twin: Callable[..., Any]
    others: tuple[Callable[..., Any], ...] = ()
    torch_class: Callable[..., Any] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    exact: bool = False


@dataclass
class Saved:
    """What was saved at one moment, of the first optimizer and of its twin."""

    state: bytes
    values: list[Tensor]
    twin: Any = field(repr=False)


def rebuilt(make: Callable[..., Any], optimizer: Any) -> Any:
    """A new optimizer of the same parameters and groups, with nothing else of the old one."""
    return make([{"params": list(group["params"])} for group in optimizer.param_groups])


def packed(optimizer: Any) -> bytes:
    """Its state dict in a file: nothing of it is shared with what reads it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.getvalue()


def read(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


class Sequences(RuleBasedStateMachine):
    """The two optimizers; subclasses choose the subject."""

    subject: Subject
    folder: Path
    skipping = False

    @initialize(dtype=st.integers(0, 1), groups=st.booleans(), chunk=st.sampled_from([100, 3000]))
    def begin(self, dtype: int, groups: bool, chunk: int) -> None:
        dtypes = self.subject.dtypes
        self.dtype, self.chunk, self.time = dtypes[dtype % len(dtypes)], chunk, 0
        self.params = [[self.parameter(shape, i) for i, shape in enumerate(SHAPES)] for _ in "ab"]
        self.make, self.twin_make = self.subject.make, self.subject.twin
        self.ours, self.twin = map(
            partial(self.grouped, groups), (self.make, self.twin_make), self.params
        )
        self.saved: Saved | None = None
        self.snapshots: list[tuple[Any, dict[str, Tensor]]] = []

    @staticmethod
    def grouped(groups: bool, make: Callable[..., Any], params: list[Parameter]) -> Any:
        if not groups:
            return make(params)
        return make([{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}])

    def parameter(self, shape: tuple[int, ...], seed: int) -> Parameter:
        return Parameter(self.noise(shape, 10_000 + seed))

    def noise(self, shape: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.dtype)

    @property
    def both(self) -> tuple[tuple[Any, list[Parameter]], tuple[Any, list[Parameter]]]:
        return (self.ours, self.params[0]), (self.twin, self.params[1])

    @property
    def coded(self) -> bool:
        return isinstance(self.ours, CodedOptimizer)

    def gradient(self, number: int, param: Tensor) -> Tensor:
        return self.noise(param.shape, 100 * self.time + number)

    # what changes the training: done to both

    @rule(missing=st.sets(st.integers(0, 6), max_size=3))
    def step(self, missing: set[int]) -> None:
        self.time += 1
        for optimizer, params in self.both:
            for number, param in enumerate(params):
                kept = number not in missing and param.requires_grad
                param.grad = self.gradient(number, param) if kept else None
            optimizer.step()
            optimizer.zero_grad()

    @rule()
    def step_without_gradients(self) -> None:
        for optimizer, _ in self.both:
            optimizer.zero_grad()
            optimizer.step()

    @rule(number=NUMBERS, value=st.sampled_from([float("nan"), float("inf")]))
    @precondition(lambda self: self.skipping)
    def step_with_a_nonfinite_gradient(self, number: int, value: float) -> None:
        """The first optimizer skips it; the second does not see it."""
        params = self.params[0]
        for index, param in enumerate(params):
            param.grad = self.gradient(index, param)
        bad = params[number % len(params)]
        if bad.numel():
            bad.grad.view(-1)[-1] = value
            self.ours.step()
        self.ours.zero_grad()

    @rule(number=NUMBERS, rate=st.floats(1e-4, 1e-1), tensor=st.booleans())
    def change_rate(self, number: int, rate: float, tensor: bool) -> None:
        # torch divides a tensor in float32; the family takes the number that it holds
        self.change("lr", torch.tensor(rate) if tensor else rate, number)

    @rule(number=NUMBERS, decay=st.sampled_from([0.0, 0.01, 0.3]))
    def change_weight_decay(self, number: int, decay: float) -> None:
        self.change("weight_decay", decay, number)

    def change(self, key: str, value: Any, number: int) -> None:
        for optimizer, _ in self.both:
            group = optimizer.param_groups[number % len(optimizer.param_groups)]
            exact = self.subject.exact and optimizer is self.twin
            group[key] = float(value) if exact else copy.deepcopy(value)

    @rule(shape=SIZES)
    @precondition(lambda self: len(self.params[0]) < 7)
    def add_group(self, shape: tuple[int, ...]) -> None:
        for optimizer, params in self.both:
            params.append(self.parameter(shape, len(params)))
            optimizer.add_param_group({"params": params[-1:], "lr": 3e-3})
        self.saved = None

    @rule(number=NUMBERS)
    def freeze_or_unfreeze(self, number: int) -> None:
        for _, params in self.both:
            param = params[number % len(params)]
            param.requires_grad_(not param.requires_grad)

    @rule()
    @precondition(lambda self: not self.subject.exact and len(self.subject.dtypes) > 1)
    def change_dtype(self) -> None:
        """As ``model.to(dtype)`` does."""
        self.dtype = torch.bfloat16 if self.dtype == torch.float32 else torch.float32
        for _, params in self.both:
            for param in params:
                param.data = param.data.to(self.dtype)
                param.grad = None
        self.saved = None

    @rule(number=NUMBERS)
    def forget_state(self, number: int) -> None:
        for optimizer, params in self.both:
            optimizer.state.pop(params[number % len(params)], None)

    @rule(which=NUMBERS)
    @precondition(lambda self: self.subject.others)
    def convert(self, which: int) -> None:
        """Load into an optimizer with other formats, which encodes anew."""
        self.make = self.twin_make = self.subject.others[which % len(self.subject.others)]
        self.ours = self.loaded(self.ours, self.make)
        self.twin = self.loaded(self.twin, self.twin_make)
        self.saved = None

    @rule()
    @precondition(lambda self: self.coded and self.subject.torch_class)
    def through_torch(self) -> None:
        """Continue in ``torch.optim`` and come back; its state dict has decoded moments."""
        self.ours = self.through(self.ours, self.make)
        if not self.subject.exact:
            self.twin = self.through(self.twin, self.twin_make)
        self.saved = None

    def through(self, optimizer: Any, make: Callable[..., Any]) -> Any:
        assert self.subject.torch_class is not None
        theirs = rebuilt(self.subject.torch_class, optimizer)
        theirs.load_state_dict(optimizer.full_state_dict())
        found = rebuilt(make, optimizer)
        found.load_state_dict(theirs.state_dict())
        return found

    # what changes nothing: done to the first only

    def loaded(self, optimizer: Any, make: Callable[..., Any]) -> Any:
        found = rebuilt(make, optimizer)
        found.load_state_dict(read(packed(optimizer)))
        return found

    @rule()
    def save_and_load_into_a_new_one(self) -> None:
        self.ours = self.loaded(self.ours, self.make)

    @rule()
    def load_its_own(self) -> None:
        self.ours.load_state_dict(self.ours.state_dict())

    @rule()
    @precondition(lambda self: self.coded)
    def through_safetensors(self) -> None:
        path = self.folder / "state.safetensors"
        save_safetensors(self.ours, path)
        self.ours = rebuilt(self.make, self.ours)
        load_safetensors(self.ours, path)

    @rule()
    def save(self) -> None:
        values = [param.detach().clone() for param in self.params[0]]
        self.saved = Saved(packed(self.ours), values, self.copied(self.twin, self.params[1]))

    @rule()
    @precondition(lambda self: self.saved is not None)
    def go_back(self) -> None:
        """Load what was saved some time ago, over state of now."""
        assert self.saved is not None
        self.ours.load_state_dict(read(self.saved.state))
        frozen = [param.requires_grad for param in self.params[0]]
        for param, value in zip(self.params[0], self.saved.values, strict=True):
            param.data.copy_(value)
        self.twin, self.params[1] = self.copied(*self.saved.twin)
        for param, requires_grad in zip(self.params[1], frozen, strict=True):
            param.requires_grad_(requires_grad)

    @staticmethod
    def copied(optimizer: Any, params: list[Parameter]) -> Any:
        return copy.deepcopy((optimizer, params))

    @rule(pickled=st.booleans())
    @precondition(lambda self: not self.on_disk)
    def copy_all(self, pickled: bool) -> None:
        pair = (self.ours, self.params[0])
        pair = pickle.loads(pickle.dumps(pair)) if pickled else copy.deepcopy(pair)
        self.ours, self.params[0] = pair

    @property
    def on_disk(self) -> bool:
        offloaded = getattr(self.ours, "offloaded", None)
        return offloaded is not None and offloaded.store == "disk"

    @rule(disk=st.booleans())
    @precondition(lambda self: self.coded and self.ours.offloaded is None)
    def offload(self, disk: bool) -> None:
        path = {"path": self.folder / f"state-{next(FILES)}"} if disk else {}
        offload(self.ours, "disk" if disk else "host", chunk_bytes=self.chunk, **path)

    @rule()
    @precondition(lambda self: self.on_disk and self.params[0][0].requires_grad)
    def step_and_resume_from_the_file(self) -> None:
        """The manifest is that of the last whole step; resuming ends snapshots in the file."""
        self.close_snapshots()
        self.step(set())
        path = self.ours.offloaded.path
        found = rebuilt(self.make, self.ours)
        self.ours = None
        self.ours = offload(found, "disk", path=path, resume=True, chunk_bytes=self.chunk)

    @rule()
    @precondition(lambda self: self.coded and len(self.snapshots) < 2)
    def take_a_snapshot(self) -> None:
        expected = tensors_in("", rebuilt_state(self.ours))
        self.snapshots.append((snapshot(self.ours), expected))

    @rule()
    @precondition(lambda self: self.snapshots)
    def close_a_snapshot(self) -> None:
        taken, expected = self.snapshots.pop(0)
        with taken:
            found = tensors_in("", taken.state_dict()["state"])
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert same(found[name], value), f"snapshot: {name}"

    @rule(bucket=st.sampled_from([0, 3000, 1 << 30]), steps=st.integers(1, 2))
    @precondition(lambda self: not self.skipping and hasattr(self.ours, "step_part"))
    def release_gradients(self, bucket: int, steps: int) -> None:
        """Steps during backward, by the first optimizer."""
        with GradientRelease(self.ours, bucket_bytes=bucket):
            for _ in range(steps):
                self.time += 1
                for optimizer, params in self.both:
                    wanted = [(p, self.gradient(i, p)) for i, p in enumerate(params)]
                    losses = [(p * grad).sum() for p, grad in wanted if p.requires_grad]
                    if losses:
                        torch.stack(losses).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()

    @invariant()
    def every_bit_is_the_same(self) -> None:
        if not hasattr(self, "twin"):
            return
        states = self.ours.state, self.twin.state
        for number, (mine, theirs) in enumerate(zip(*self.params, strict=True)):
            assert same(mine.detach(), theirs.detach()), f"parameter {number}"
            left, right = states[0].get(mine, {}), states[1].get(theirs, {})
            left, right = (self.comparable(state) for state in (left, right))
            assert left.keys() == right.keys(), f"parameter {number}"
            for key, value in left.items():
                assert same(value, right[key]), f"parameter {number}: {key}"
        for key in ("lr", "weight_decay"):
            values = [[float(g[key]) for g in optimizer.param_groups] for optimizer, _ in self.both]
            assert values[0] == values[1], key

    def comparable(self, state: Any) -> dict[str, Tensor]:
        """Tensors; step counts only where both count."""
        found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        if self.subject.exact:
            found.pop("step", None)
        return found

    def close_snapshots(self) -> None:
        while getattr(self, "snapshots", ()):
            self.close_a_snapshot()

    def teardown(self) -> None:
        self.close_snapshots()
        self.ours = self.twin = None


def rebuilt_state(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer.state_dict()["state"])


def same(left: Tensor, right: Tensor) -> bool:
    """The same bits in the same dtype, NaN equal to NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return bool(torch.isclose(left, right, rtol=0, atol=0, equal_nan=True).all())
