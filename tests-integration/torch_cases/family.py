"""Every public optimizer of the family, with the class of torch whose cases it takes."""

from __future__ import annotations

import atexit
import copy
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import lowbit_adam
import optstate_wrap
import stochbf16
from optstate_codecs import CodedOptimizer, offload, rules
from optstate_wrap import ConfigurablePolicy, CPUOffloadOptimizer, OffloadOptimizer, wrap
from optstate_wrap.presets import MaxCompressionPolicy
from turboadam import TurboAdam

__all__ = ["CODED", "FAMILY", "OFFLOADED", "ON_HOST", "WRAPPED", "Subject"]

Make = Callable[..., Optimizer]
FLAGS = ("foreach", "fused", "capturable", "differentiable")


def plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments without flags, and with the numbers that tensors hold."""

    def number(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(number, value))
        return float(value) if isinstance(value, Tensor) else value

    return {key: number(value) for key, value in kwargs.items() if key not in FLAGS}


def _one_by_one(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**plain(kwargs), "foreach": False}


@dataclass(frozen=True, eq=False)
class Subject:
    """An optimizer that is put through the cases of a class of torch.

    Attributes:
        name: for test ids.
        like: the name of torch's class.
        make: builds it from parameters and arguments of that class.
        oracle: builds the optimizer whose exact arithmetic it has, from the same; None: torch's
            class itself, stepping one tensor after the other.
        plus: further arguments under which its steps are the oracle's.
        gradient: what the gradients are to be like for that.
        error: how far from the oracle three steps may end, relative root mean square of the
            distance; 0: nowhere, bit by bit.
        coded: whether a ``CodedOptimizer`` steps, and not torch's optimizer inside.
    """

    name: str
    like: str
    make: Make
    oracle: Make | None = None
    plus: dict[str, Any] = field(default_factory=dict)
    gradient: Callable[[Tensor], Tensor] = field(default=lambda grad: grad)
    error: float = 0.0
    coded: bool = True

    def __repr__(self) -> str:
        return self.name

    @property
    def needs_closure(self) -> bool:
        return self.like == "LBFGS"

    @property
    def sparse(self) -> bool:
        return self.like == "SparseAdam"

    @property
    def inside(self) -> type[Optimizer]:
        """Torch's class."""
        return getattr(torch.optim, self.like)

    def exact(self, params: Any, **kwargs: Any) -> Optimizer:
        """The oracle; its arguments are copies, so that neither optimizer sees the other's."""
        kwargs = copy.deepcopy(kwargs)
        if self.oracle is not None:
            return self.oracle(params, **kwargs)
        return self.inside(params, **(_one_by_one(kwargs) if self.coded else kwargs))


def _fp32(rule: rules.Rule) -> Make:
    """The rule with every moment in float32."""
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
    formats = dict.fromkeys((*names, "ema", "ema_squared", "smoothing"), "fp32")
    return partial(CodedOptimizer, rule=rule, formats=formats)


def _without_first_moment(params: Any, beta: float = 0.999, **kwargs: Any) -> Optimizer:
    """AdamW that divides the gradient itself: RMSProp with bias correction."""
    kwargs = {"weight_decay": 0.0, **_one_by_one(kwargs)}
    return torch.optim.AdamW(params, betas=(0.0, beta), **kwargs)


def _second_of(params: Any, amp_fac: float, betas: tuple[float, ...], **kwargs: Any) -> Optimizer:
    """AdamW with the last two betas of a rule whose amplification is off."""
    assert amp_fac == 0
    kwargs = {"weight_decay": 0.0, **_one_by_one(kwargs)}
    return torch.optim.AdamW(params, betas=betas[-2:], **kwargs)


def _of_signs(params: Any, betas: tuple[float, float], **kwargs: Any) -> Optimizer:
    """AdamW of gradients of 1 and -1 without memory: what Lion is at ``betas[0] = 0``."""
    assert betas[0] == 0
    kwargs = {"weight_decay": 0.0, "lr": 1e-4, **_one_by_one(kwargs)}
    return torch.optim.AdamW(params, betas=(0.0, 0.0), eps=0.0, **kwargs)


def _no_decay(params: Any, **kwargs: Any) -> Optimizer:
    """AdamW without weight decay unless it is asked for, as TurboAdam and stochbf16 have it."""
    return torch.optim.AdamW(params, **{"weight_decay": 0.0, **_one_by_one(kwargs)})


# roots of rules that torch has no class of are rounded correctly; torch's are an ulp off
ROOTS = 1e-5
LPF = {"oracle": _second_of, "plus": {"amp_fac": 0.0, "betas": (0.9, 0.9, 0.999)}}
COMPASS = {"oracle": _second_of, "plus": {"amp_fac": 0.0, "betas": (0.0, 0.999)}}
LION = {"oracle": _of_signs, "plus": {"betas": (0.0, 0.99)}, "gradient": torch.sign}
RMSPROP = {"oracle": _without_first_moment}

turbo = partial(TurboAdam, min_m_compress_elements=0, min_v_compress_elements=0)

#: as suite/bounds.py states what three steps may be off
CODED = [
    Subject("Adam8bit", "Adam", lowbit_adam.Adam8bit, error=0.1),
    Subject("AdamW8bit", "AdamW", lowbit_adam.AdamW8bit, error=0.1),
    Subject("AdamFp8", "Adam", lowbit_adam.AdamFp8, error=0.1),
    Subject("AdamWFp8", "AdamW", lowbit_adam.AdamWFp8, error=0.1),
    Subject("Adam4bit", "Adam", lowbit_adam.Adam4bit, error=0.4),
    Subject("AdamW4bit", "AdamW", lowbit_adam.AdamW4bit, error=0.4),
    Subject("SGD8bit", "SGD", lowbit_adam.SGD8bit, error=0.1),
    Subject("Lion8bit", "AdamW", lowbit_adam.Lion8bit, error=0.1, **LION),
    Subject("TurboAdam", "AdamW", turbo, _no_decay, error=0.5),
    Subject("TurboAdam-adamw", "AdamW", partial(turbo, mode="adamw"), _no_decay, error=0.2),
    Subject("TurboAdam-small", "AdamW", TurboAdam, _no_decay),
    Subject("stochbf16.AdamW", "AdamW", stochbf16.AdamW, _no_decay, error=0.02),
    Subject("stochbf16.Adam", "Adam", stochbf16.Adam, error=0.02),
    Subject("stochbf16.Compass", "AdamW", stochbf16.Compass, error=0.02, **COMPASS),
    Subject("stochbf16.LPFAdamW", "AdamW", stochbf16.LPFAdamW, error=0.02, **LPF),
    Subject("stochbf16.RMSProp", "RMSprop", stochbf16.RMSProp, error=0.02, **RMSPROP),
    Subject("stochbf16.SGD", "SGD", stochbf16.SGD, error=0.02),
    Subject("stochbf16.Lion", "AdamW", stochbf16.Lion, error=0.02, **LION),
    Subject("fp32-Adam", "Adam", _fp32(rules.Adam())),
    Subject("fp32-AdamW", "AdamW", _fp32(rules.Adam(decoupled=True))),
    Subject("fp32-SGD", "SGD", _fp32(rules.SGD())),
    Subject("fp32-RMSProp", "RMSprop", _fp32(rules.RMSProp()), error=ROOTS, **RMSPROP),
    Subject("fp32-Compass", "AdamW", _fp32(rules.Compass()), error=ROOTS, **COMPASS),
    Subject("fp32-LPFAdamW", "AdamW", _fp32(rules.LPFAdamW()), error=ROOTS, **LPF),
    Subject("fp32-Lion", "AdamW", _fp32(rules.Lion()), **LION),
]


def offloaded(make: Make, **options: Any) -> Make:
    """The optimizer with its state in host memory, brought in chunk by chunk."""
    return lambda params, **kwargs: offload(make(params, **kwargs), chunk_bytes=1024, **options)


FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
_number = itertools.count()


def on_disk(make: Make) -> Make:
    """The optimizer with its state in a file of its own."""
    return lambda params, **kwargs: offload(
        make(params, **kwargs), "disk", path=FOLDER / str(next(_number)), chunk_bytes=1024
    )


#: their state is elsewhere, their steps are the same
OFFLOADED = [
    Subject("offload-AdamW8bit", "AdamW", offloaded(lowbit_adam.AdamW8bit), error=0.1),
    Subject("offload-SGD8bit", "SGD", offloaded(lowbit_adam.SGD8bit), error=0.1),
    Subject("offload-TurboAdam", "AdamW", offloaded(turbo), _no_decay, error=0.5),
    Subject("offload-stochbf16.Adam", "Adam", offloaded(stochbf16.Adam), error=0.02),
    Subject("offload-fp32-Adam", "Adam", offloaded(_fp32(rules.Adam()))),
    Subject("disk-fp32-AdamW", "AdamW", on_disk(_fp32(rules.Adam(decoupled=True)))),
]

#: stepped whole, as the wrapper's warning says
WHOLE = ("LBFGS", "SparseAdam")
exactly = partial(wrap, policy=ConfigurablePolicy({}))


def wrapped(like: str, by: Make = exactly) -> Make:
    """Torch's class in a wrapper, exact by default, that steps it in chunks and parts."""

    def build(params: Any, **kwargs: Any) -> Optimizer:
        inner = getattr(torch.optim, like)(params, **kwargs)
        with warnings.catch_warnings():
            if like in WHOLE or kwargs.get("differentiable"):
                warnings.filterwarnings("ignore", ".*cannot be stepped in chunks")
            return by(inner, chunk_size=256)

    return build


NAMES = (
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "Muon"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
)


def _preset(params: Any, **kwargs: Any) -> Optimizer:
    """AdamW with the defaults that the presets have."""
    return torch.optim.AdamW(params, **{"lr": 5e-5, "weight_decay": 0.01, **kwargs})


low_memory = partial(optstate_wrap.wrap_low_memory_adamw, warmup_steps=1, min_int8_elements=0)
four_bits = partial(wrap, policy=MaxCompressionPolicy(min_elements=0), fused=True)
WRAPPED = [
    *(Subject(f"wrap-{like}", like, wrapped(like), coded=False) for like in NAMES),
    Subject("wrap-4bit", "AdamW", wrapped("AdamW", four_bits), error=0.4, coded=False),
    Subject("wrap-low-memory", "AdamW", low_memory, _preset, error=0.1, coded=False),
    # small tensors stay exact
    Subject(
        "wrap-max-compression",
        "AdamW",
        optstate_wrap.wrap_max_compression_adamw,
        _preset,
        coded=False,
    ),
    *(
        Subject(f"OffloadOptimizer-{like}", like, wrapped(like, OffloadOptimizer), coded=False)
        for like in ("AdamW", "SGD", "Adagrad")
    ),
]


class Remote(CPUOffloadOptimizer):
    """Takes the CPU for a device, and so steps on copies."""

    def _remote(self, param: Tensor) -> bool:
        return True


def _on_host(like: str, outside: type[CPUOffloadOptimizer]) -> Make:
    """Torch's class in an optimizer that keeps and steps its state on the host."""
    return lambda params, **kwargs: outside(
        params, getattr(torch.optim, like), minimal_size=32, **kwargs
    )


def _fused(like: str) -> Make:
    """Torch's class, fused unless something else is asked for, as it is on the host."""

    def oracle(params: Any, **kwargs: Any) -> Optimizer:
        optimizer = getattr(torch.optim, like)(params, **kwargs)
        for group in optimizer.param_groups:
            if not group["foreach"] and not group["differentiable"] and group["fused"] is None:
                group["fused"] = all(param.is_floating_point() for param in group["params"])
        return optimizer

    return oracle


on_host_8bit = partial(Remote, optimizer_class=lowbit_adam.AdamW8bit, minimal_size=32)
on_host_adam = _on_host("Adam", Remote)
on_host_adamw = _on_host("AdamW", CPUOffloadOptimizer)
ON_HOST = [
    Subject("CPUOffload-AdamW", "AdamW", on_host_adamw, _fused("AdamW"), coded=False),
    Subject("CPUOffload-SGD", "SGD", _on_host("SGD", CPUOffloadOptimizer), coded=False),
    Subject("CPUOffload-Adam-copies", "Adam", on_host_adam, _fused("Adam"), coded=False),
    Subject("CPUOffload-NAdam-copies", "NAdam", _on_host("NAdam", Remote), coded=False),
    Subject("CPUOffload-AdamW8bit-copies", "AdamW", on_host_8bit, error=0.1),
]

FAMILY = [*CODED, *OFFLOADED, *WRAPPED, *ON_HOST]
