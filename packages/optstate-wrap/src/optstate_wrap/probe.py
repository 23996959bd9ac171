"""What an optimizer allows, found out by trying it on three tiny tensors.

Four steps are taken whole, in chunks of one tensor, and with the tensors split, by the wrapper's
own engine with exact state. Where every bit of parameters, state and groups comes out the same,
chunks may be stepped one by one, or tensors in parts.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate_codecs.tables import in_mode
from optstate_wrap.delegate import unhooked_step
from optstate_wrap.policies import ConfigurablePolicy
from optstate_wrap.state.store import DeviceStore
from optstate_wrap.step.chunked import Engine

__all__ = ["Findings", "first_param", "probe", "why_not"]

# one group's tensors: odd, of one row, and of three dimensions
_log = logging.getLogger(__name__)

Shapes = tuple[tuple[int, ...], ...]
SHAPES: Shapes = ((5, 37), (150,), (2, 3, 29))
MATRICES: Shapes = ((5, 37), (10, 15), (6, 29))
PART = 64
STEPS = 4
#: groups that differ are tried together, up to this many
GROUPS = 8
REMEMBERED = 256


@dataclass(frozen=True)
class Findings:
    """What a probe has found.

    Attributes:
        chunked: stepping some parameters at a time changes nothing.
        splittable: neither does stepping a tensor in parts.
        keys: state keys that every tensor had, each with the dtype of its tensors where that is
            not the parameter's, else None.
        optional: state keys that only some had, or only at times.
        elementwise: keys whose values have the parameter's shape.
        counts_in_tensors: whether ``step`` is a tensor.
        tried: whether it could be tried at all; otherwise, nothing is known of its keys.
    """

    chunked: bool
    splittable: bool
    keys: Mapping[str, torch.dtype | None]
    optional: frozenset[str] = frozenset()
    elementwise: frozenset[str] = frozenset()
    counts_in_tensors: bool = False
    tried: bool = True

    @property
    def known(self) -> frozenset[str] | None:
        """The state keys that the optimizer makes; None: nobody knows."""
        return frozenset(self.keys) | self.optional if self.tried else None


_found: dict[Any, Findings] = {}
_reasons: dict[Any, str | None] = {}


def probe(inner: Optimizer) -> Findings:
    """Try ``inner``'s class with its groups' hyper-parameters; remembered for both.

    Neither ``inner`` nor torch's random numbers change.
    """
    with torch.inference_mode(False), torch.no_grad():
        if in_mode():
            # what fails on fake tensors may do on others
            return _probe(inner)
        key = _key(inner)
        if key not in _found:
            if len(_found) == REMEMBERED:
                # a schedule of betas makes ever new ones
                _found.clear()
            _found[key] = _probe(inner)
        return _found[key]


def why_not(
    inner: Optimizer, param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> str | None:
    """Why ``inner`` cannot step parameters of these dtypes; None: it can, or it cannot be tried.

    Args:
        inner: the optimizer.
        param: dtype of the parameter, which was of the state's dtype before.
        grad: of the gradient.
        state: of what was made like the parameter.
    """
    key = _key(inner), param, grad, state
    if key not in _reasons:
        if len(_reasons) == REMEMBERED:
            _reasons.clear()
        with _quietly(inner), _on_real_device():
            _reasons[key] = _reason(inner, param, grad, state)
    return _reasons[key]


@torch.no_grad()
def _reason(
    inner: Optimizer, param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> str | None:
    twin, params = _twin(inner, MATRICES, state)
    step = unhooked_step(twin)
    for tiny in params:
        tiny.grad = torch.ones_like(tiny)
    try:
        step(twin)
    except Exception:
        return None
    for tiny in params:
        tiny.grad = None
        tiny.data = tiny.to(grad)
        tiny.grad = torch.ones_like(tiny)
        tiny.data = tiny.to(param)
    try:
        step(twin)
    except Exception as error:
        return str(error)
    return None


@contextmanager
def _quietly(inner: Optimizer) -> Iterator[None]:
    """Inside, nobody is warned, and the generators that a step may draw from are put back."""
    devices = [device] if (device := _device(inner)).type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices):
        warnings.simplefilter("ignore")
        yield


def _key(inner: Optimizer) -> Any:
    first = first_param(inner)
    return (
        type(inner),
        (first.device.type, first.dtype),
        # what an optimizer makes may depend on torch's defaults
        (torch.get_default_dtype(), _with_numbers(torch.get_default_device())),
        tuple(_hyper(group) for group in _distinct(inner)),
    )


def first_param(inner: Optimizer) -> Tensor:
    """The first parameter; a number on the host where there is none."""
    params = [param for group in inner.param_groups for param in group["params"][:1]]
    return params[0] if params else torch.zeros((), dtype=torch.float32, device="cpu")


def _device(inner: Optimizer) -> torch.device:
    """Where to try it: beside the first parameter, but where numbers are."""
    return _with_numbers(first_param(inner).device)


def _on_real_device() -> AbstractContextManager[object]:
    """Inside, what is made without a device has numbers: models are often built on "meta"."""
    without = torch.get_default_device().type == "meta"
    return torch.device("cpu") if without else nullcontext()


def _with_numbers(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _hyper(group: Mapping[str, Any]) -> tuple[str, ...]:
    left_out = ("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr")
    return tuple(f"{key}={value!r}" for key, value in sorted(group.items()) if key not in left_out)


def _distinct(inner: Optimizer) -> list[dict[str, Any]]:
    kinds = {_hyper(group): group for group in reversed(inner.param_groups)}
    return list(reversed(kinds.values()))[:GROUPS]


def _probe(inner: Optimizer) -> Findings:
    with _quietly(inner), _on_real_device():
        shapes, whole = SHAPES, _tried(inner, SHAPES, chunked=False, chunk=1 << 30)
        if whole is None:
            # some take matrices only
            shapes, whole = MATRICES, _tried(inner, MATRICES, chunked=False, chunk=1 << 30)
        if whole is None:
            # it does not take four ordinary steps, so nothing is known about it
            return Findings(False, False, {}, tried=False)
        in_chunks = _tried(inner, shapes, chunked=True, chunk=1)
        chunked = in_chunks is not None and _equal(whole, in_chunks)
        in_parts = _tried(inner, shapes, True, PART, split=True) if chunked else None
        splittable = in_parts is not None and _equal(whole, in_parts)
    states = whole[1]
    every = set.intersection(*map(set, states)) if states else set()
    some = set().union(*states) if states else set()
    keys = {key: _dtype(states, whole[0], key) for key in sorted(every)}
    shaped = (
        [
            {k for k, v in s.items() if isinstance(v, Tensor) and v.shape == p.shape}
            for s, p in zip(states, whole[0], strict=True)
        ]
        if len(states) == len(whole[0])
        else []
    )
    elementwise = frozenset(set.intersection(*shaped)) if shaped else frozenset()
    counts = bool(states) and isinstance(states[0].get("step"), Tensor)
    return Findings(chunked, splittable, keys, frozenset(some - every), elementwise, counts)


def _dtype(states: Any, params: Any, key: str) -> torch.dtype | None:
    value, param = states[0][key], params[0]
    if isinstance(value, Tensor) and value.dtype != param.dtype:
        return value.dtype
    return None


def _tried(inner: Optimizer, shapes: Shapes, chunked: bool, chunk: int, split: bool = False) -> Any:
    """What ``_run`` returns, or None where the optimizer raises."""
    try:
        return _run(inner, shapes, chunked, chunk, split)
    except Exception:
        _log.debug("%s raised while it was tried", type(inner).__name__, exc_info=True)
        return None


def _noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def _seed(device: torch.device) -> None:
    """Seed the generators that a step may draw from, and no other device's."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def _run(inner: Optimizer, shapes: Shapes, chunked: bool, chunk: int, split: bool) -> Any:
    """Parameters, states and groups after some steps of a small twin of ``inner``."""
    _seed(_device(inner))
    twin, params = _twin(inner, shapes)
    engine = Engine(twin, ConfigurablePolicy({}), DeviceStore(), chunk, chunk, 0)
    engine.encoder.chunked, engine.encoder.splittable = chunked, split
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for number, param in enumerate(params):
            noise = _noise(param.shape, generator) * 10.0 ** (number % 3 - 1)
            # gradients come and go
            param.grad = None if (step, number % 3) == (2, 1) else noise.to(param)
        with torch.no_grad():
            engine.step()
    states = [engine.states.copy(p) for p in params if p in engine.store]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in twin.param_groups]
    counters = {key: value for key, value in vars(twin).items() if isinstance(value, (int, float))}
    return [p.detach() for p in params], states, groups, engine.states.extra, counters


def _twin(
    inner: Optimizer, shapes: Shapes, dtype: torch.dtype | None = None
) -> tuple[Optimizer, list[Parameter]]:
    """An optimizer of the same class and attributes for tiny parameters, with no state."""
    if dtype is None:
        like = first_param(inner).dtype
        dtype = like if like.is_floating_point else torch.float32
    memo: dict[int, Any] = {}
    groups, params = [], []
    generator = torch.Generator().manual_seed(2)
    for group in _distinct(inner):
        tiny = [Parameter(_noise(shape, generator).to(_device(inner), dtype)) for shape in shapes]
        groups.append({"params": tiny, **_values(group)})
        params += tiny
        memo[id(group["params"])] = tiny
        for number, param in enumerate(group["params"]):
            memo[id(param)] = tiny[number % 3]
    twin = object.__new__(type(inner))
    own = ("state", "param_groups", "step")
    rest = {
        key: value
        for key, value in vars(inner).items()
        if key not in own and not key.startswith("_optimizer_")
    }
    twin.__setstate__({**copy.deepcopy(rest, memo), "state": {}, "param_groups": groups})
    twin.state = defaultdict(dict)
    return twin, params


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's hyper-parameters, with a learning rate that shows what the step does."""
    values = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
    if isinstance(values.get("lr"), Tensor):
        values["lr"] = torch.full_like(values["lr"], 0.01)
    elif "lr" in values:
        values["lr"] = 0.01
    return values


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return (
            isinstance(b, Mapping) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
