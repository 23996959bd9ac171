"""Probes how an optimizer may be stepped, by trying it on three tiny tensors.

A probe takes four steps with all tensors at once, in batches of one tensor, and with the tensors
split, by the wrapper's own engine with exact state. If all bits of parameters, state and groups
are equal, batches may be stepped one by one, or tensors in parts.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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

_log = logging.getLogger(__name__)

Shapes = tuple[tuple[int, ...], ...]
# of a group's tensors: with odd sizes, with one dimension, and with three
SHAPES: Shapes = ((5, 37), (150,), (2, 3, 29))
MATRICES: Shapes = ((5, 37), (10, 15), (6, 29))
PART = 64
STEPS = 4
#: at most this many groups that differ are tried, all together
GROUPS = 8
REMEMBERED = 256


@dataclass(frozen=True)
class Findings:
    """The results of a probe.

    Attributes:
        chunked: stepping the parameters in batches gives the same result.
        splittable: so does stepping a tensor in parts.
        keys: state keys of every tensor, each with the dtype of its tensors; None if that is the
            parameter's.
        optional: state keys of some tensors or some steps only.
        elementwise: keys whose values have the parameter's shape.
        counts_in_tensors: whether ``step`` is a tensor.
        tried: whether the optimizer could be tried; otherwise its keys are unknown.
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
        """The state keys that the optimizer makes; None: unknown."""
        return frozenset(self.keys) | self.optional if self.tried else None


_found: dict[Any, Findings] = {}
_reasons: dict[Any, str | None] = {}


def probe(inner: Optimizer) -> Findings:
    """Try the class of ``inner`` with its groups' hyper-parameters; results are cached by both.

    ``inner`` and torch's random generators do not change.
    """
    with torch.inference_mode(False), torch.no_grad():
        if in_mode():
            # not cached: a failure may be due to fake tensors
            return _probe(inner)
        key = _key(inner)
        if key not in _found:
            if len(_found) == REMEMBERED:
                # for example, a schedule of betas makes a new key at each step
                _found.clear()
            _found[key] = _probe(inner)
        return _found[key]


def why_not(
    inner: Optimizer, param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> str | None:
    """Why ``inner`` cannot step parameters with these dtypes; None: it can, or it is unknown.

    Args:
        inner: the optimizer.
        param: dtype of the parameter, which had the dtype ``state`` before.
        grad: dtype of the gradient.
        state: dtype of the state that has the parameter's shape.
    """
    key = _key(inner), param, grad, state
    if key not in _reasons:
        if len(_reasons) == REMEMBERED:
            _reasons.clear()
        with _isolated(inner):
            _reasons[key] = _reason(inner, param, grad, state)
    return _reasons[key]


@torch.no_grad()
def _reason(
    inner: Optimizer, param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> str | None:
    tiny, params = _tiny_copy(inner, MATRICES, state)
    step = unhooked_step(tiny)
    for p in params:
        p.grad = torch.ones_like(p)
    try:
        step(tiny)
    except Exception:
        return None
    for p in params:
        p.grad = None
        p.data = p.to(grad)
        p.grad = torch.ones_like(p)
        p.data = p.to(param)
    try:
        step(tiny)
    except Exception as error:
        return str(error)
    return None


@contextmanager
def _isolated(inner: Optimizer) -> Iterator[None]:
    """Inside, nothing warns, random generators are put back, and new tensors are not on "meta"."""
    devices = [device] if (device := _device(inner)).type == "cuda" else []
    on_meta = torch.get_default_device().type == "meta"
    with warnings.catch_warnings(), torch.random.fork_rng(devices):
        warnings.simplefilter("ignore")
        with torch.device("cpu") if on_meta else nullcontext():
            yield


def _key(inner: Optimizer) -> Any:
    first = first_param(inner)
    return (
        type(inner),
        (first.device.type, first.dtype),
        # the tensors that an optimizer makes may depend on torch's defaults
        (torch.get_default_dtype(), _off_meta(torch.get_default_device())),
        tuple(_hyper(group) for group in _distinct(inner)),
    )


def first_param(inner: Optimizer) -> Tensor:
    """The first parameter; a 0-d tensor on the CPU if there is none."""
    params = [param for group in inner.param_groups for param in group["params"][:1]]
    return params[0] if params else torch.zeros((), dtype=torch.float32, device="cpu")


def _device(inner: Optimizer) -> torch.device:
    """The device for the tiny tensors: the first parameter's, but not "meta"."""
    return _off_meta(first_param(inner).device)


def _off_meta(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _hyper(group: Mapping[str, Any]) -> tuple[str, ...]:
    left_out = ("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr")
    return tuple(f"{key}={value!r}" for key, value in sorted(group.items()) if key not in left_out)


def _distinct(inner: Optimizer) -> list[dict[str, Any]]:
    kinds = {_hyper(group): group for group in reversed(inner.param_groups)}
    return list(reversed(kinds.values()))[:GROUPS]


def _probe(inner: Optimizer) -> Findings:
    with _isolated(inner):
        shapes, whole = SHAPES, _run(inner, SHAPES, chunked=False, size=1 << 30)
        if whole is None:
            # some optimizers take matrices only
            shapes, whole = MATRICES, _run(inner, MATRICES, chunked=False, size=1 << 30)
        if whole is None:
            return Findings(False, False, {}, tried=False)
        in_batches = _run(inner, shapes, chunked=True, size=1)
        chunked = in_batches is not None and _equal(whole, in_batches)
        in_parts = _run(inner, shapes, True, PART, split=True) if chunked else None
        splittable = in_parts is not None and _equal(whole, in_parts)
    params, states = whole[:2]
    every = set.intersection(*map(set, states)) if states else set()
    some = set().union(*states) if states else set()
    keys = {key: _dtype(states[0][key], params[0]) for key in sorted(every)}
    pairs = zip(states, params, strict=True) if len(states) == len(params) else ()
    shaped = [
        {k for k, v in s.items() if isinstance(v, Tensor) and v.shape == p.shape} for s, p in pairs
    ]
    elementwise = frozenset(set.intersection(*shaped)) if shaped else frozenset()
    counts = bool(states) and isinstance(states[0].get("step"), Tensor)
    return Findings(chunked, splittable, keys, frozenset(some - every), elementwise, counts)


def _dtype(value: Any, param: Tensor) -> torch.dtype | None:
    return value.dtype if isinstance(value, Tensor) and value.dtype != param.dtype else None


def _noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def _seed(device: torch.device) -> None:
    """Seed the generators that a step may use, but not those of other devices."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def _run(inner: Optimizer, shapes: Shapes, chunked: bool, size: int, split: bool = False) -> Any:
    """Take some steps with a tiny copy of ``inner``, in batches of ``size`` if ``chunked``.

    Returns:
        parameters, their states, groups, other state and counters; None if the optimizer raises.
    """
    try:
        _seed(_device(inner))
        tiny, params = _tiny_copy(inner, shapes)
        engine = Engine(tiny, ConfigurablePolicy({}), DeviceStore(), size, size, 0)
        engine.encoder.chunked, engine.encoder.splittable = chunked, split
        generator = torch.Generator().manual_seed(1)
        for step in range(STEPS):
            for number, param in enumerate(params):
                noise = _noise(param.shape, generator) * 10.0 ** (number % 3 - 1)
                # one gradient is missing in one step
                param.grad = None if (step, number % 3) == (2, 1) else noise.to(param)
            with torch.no_grad():
                engine.step()
        states = [engine.states.copy(p) for p in params if p in engine.store]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in tiny.param_groups]
        counters = {
            key: value for key, value in vars(tiny).items() if isinstance(value, (int, float))
        }
        return [p.detach() for p in params], states, groups, engine.states.extra, counters
    except Exception:
        _log.debug("%s raised while it was tried", type(inner).__name__, exc_info=True)
        return None


def _tiny_copy(
    inner: Optimizer, shapes: Shapes, dtype: torch.dtype | None = None
) -> tuple[Optimizer, list[Parameter]]:
    """An optimizer of the same class and attributes, for tiny parameters and without state."""
    if dtype is None:
        like = first_param(inner).dtype
        dtype = like if like.is_floating_point else torch.float32
    memo: dict[int, Any] = {}
    groups, params = [], []
    generator = torch.Generator().manual_seed(2)
    for group in _distinct(inner):
        new = [Parameter(_noise(shape, generator).to(_device(inner), dtype)) for shape in shapes]
        groups.append({"params": new, **_values(group)})
        params += new
        memo[id(group["params"])] = new
        for number, param in enumerate(group["params"]):
            memo[id(param)] = new[number % 3]
    tiny = object.__new__(type(inner))
    own = ("state", "param_groups", "step")
    rest = {
        key: value
        for key, value in vars(inner).items()
        if key not in own and not key.startswith("_optimizer_")
    }
    tiny.__setstate__({**copy.deepcopy(rest, memo), "state": {}, "param_groups": groups})
    tiny.state = defaultdict(dict)
    return tiny, params


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's hyper-parameters, with a learning rate at which steps have a visible effect."""
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
