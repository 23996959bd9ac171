"""Laws 1 to 6, on the numbers that an optimizer computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from optstate_codecs.optimizer import CodedOptimizer
from optstate_codecs.testing.fidelity import compare
from optstate_codecs.testing.subject import Subject, Trainer, assert_same, normal
from optstate_codecs.views import decode_state

__all__ = [
    "exactness",
    "locality",
    "positive_stays_positive",
    "scale_equivariance",
    "unbiased_length",
    "zero_stays",
]

LR = 1e-2


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _follow(optimizer: CodedOptimizer, param: Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        param.grad = grad.to(param.device).view_as(param)
        optimizer.step()


def exactness(subject: Subject) -> None:
    """Law 1: with exact formats, bit-equal to ``torch.optim`` in parameters and state.

    Forty steps of groups with their own rates, with and without weight decay, for each of
    ``subject.variants``, and gradients that come and go.
    """
    if subject.exact is None:
        raise ValueError(f"{subject.name}: exactness needs the torch.optim class to equal")
    for weight_decay, variant, maximize in product((0.0, 0.1), subject.variants, (False, True)):
        options = {"weight_decay": weight_decay, "maximize": maximize, **variant}
        ours = Trainer(partial(_grouped, subject.make, options)).run(40)
        theirs = Trainer(partial(_grouped, subject.exact, options)).run(40)
        expected, got = theirs.tensors(), ours.tensors()
        if not ours.optimizer.rule.counted:  # type: ignore[attr-defined]
            got = {key: value for key, value in got.items() if not key.endswith(" step")}
        assert_same(f"exactness {options}", expected, got)


def _grouped(
    make: Callable[..., Optimizer], options: dict[str, Any], params: list[Tensor]
) -> Optimizer:
    return make([{"params": params[:2], "lr": LR}, {"params": params[2:]}], **options)


def zero_stays(subject: Subject) -> None:
    """Law 2: elements without gradients do not move, and do not drift after gradients stop.

    Half of the elements of every block never get a gradient and stay bitwise the same. The others
    get one for 50 steps and none for 1,000; in those 1,000 they move as far as with exact
    arithmetic, within ``subject.drift`` lr.
    """
    numel, lr = 6000, 1e-3
    start = subject.shaped(normal(numel, _generator()))
    still = subject.shaped(torch.arange(numel, dtype=torch.int64, device="cpu") % 2 == 0)
    param, exact = Parameter(start.clone()), Parameter(start.double())
    ours = subject.make([param], lr=lr, weight_decay=0.0)
    reference = subject.near([exact], lr=lr)
    noise = _generator(1)
    stopped = start, start.double()
    for step in range(1050):
        if step == 50:
            stopped = param.detach().clone(), exact.detach().clone()
        grad = subject.shaped(normal(numel, noise)) * (step < 50) * ~still
        param.grad, exact.grad = grad, grad.double()
        ours.step()
        reference.step()
    if not torch.equal(param[still], start[still]):
        raise AssertionError("zero stays: an element without gradient moved")
    moved, due = param.detach() - stopped[0], exact.detach() - stopped[1]
    drift = float((moved - due).abs().max()) / lr
    if not drift <= subject.drift:
        raise AssertionError(f"zero stays: drifted {drift:.3g} lr, at most {subject.drift:g}")


def positive_stays_positive(subject: Subject) -> None:
    """Law 3: a second moment above zero stays above zero, and steps keep to a bound.

    Gradients whose second moments spread log-normally, sigma 2, inside each block; 200 steps.
    """
    numel = 8192
    spread = torch.exp(normal(numel, _generator()))
    noise = _generator(1)
    param = Parameter(subject.shaped(torch.zeros_like(spread)))
    optimizer = subject.make([param], lr=LR, weight_decay=0.0)
    longest = 0.0
    for _ in range(200):
        before = param.detach().clone()
        _follow(optimizer, param, [normal(numel, noise) * spread])
        longest = max(longest, float((param.detach() - before).abs().max()) / LR)
    for moment in optimizer.rule.moments(optimizer.rule.hyper(optimizer.param_groups[0])):
        if not moment.signed and not (decode_state(optimizer, param)[moment.name] > 0).all():
            raise AssertionError(f"positive stays positive: {moment.name} holds a zero")
    if not longest <= subject.max_step:
        raise AssertionError(
            f"positive stays positive: a step of {longest:.3g} lr, at most {subject.max_step:g}"
        )


def unbiased_length(
    subject: Subject, betas: Sequence[float] = (0.95, 0.999), steps: int = 1500
) -> None:
    """Law 4: updates have the length of exact Adam's, within ``subject.gain``.

    The gain <u_q, u> / <u, u> over the last 100 steps, with dense and with 5 % sparse gradients,
    for each beta2 in ``betas``. The fidelity lab runs all formats for 3,000 steps.
    """
    kinds = ("dense", "5 % sparse")
    make = partial(subject.make, amsgrad=False)
    for beta2 in betas:
        rows, device = subject.rows, subject.device
        (found,) = compare(
            {"": make}, beta2, kinds, steps=steps, numel=8192, rows=rows, device=device
        ).values()
        for kind, fidelity in found.items():
            if not abs(fidelity.gain - 1) <= subject.gain:
                raise AssertionError(
                    f"unbiased length: gain {fidelity.gain:.4f} with {kind} gradients at beta2 "
                    f"{beta2}, at most {subject.gain:g} from 1 allowed"
                )


def scale_equivariance(subject: Subject) -> None:
    """Law 5: gradients (and eps) times 2^k give identical codes, for k from -40 to 40.

    For rules whose steps do not depend on the scale of gradients: not for SGD.
    """
    numel, eps = 5000, 1e-8
    grads = [normal(numel, _generator(t)) for t in range(8)]

    def codes(k: int) -> tuple[Tensor, dict[str, Tensor]]:
        param = Parameter(subject.shaped(torch.ones_like(grads[0])))
        optimizer = subject.make([param], lr=LR, weight_decay=0.0)
        if "eps" in optimizer.defaults:
            optimizer.param_groups[0]["eps"] = math.ldexp(eps, k)
        _follow(optimizer, param, [grad * 2.0**k for grad in grads])
        state = optimizer.state[param]
        return param.detach(), {n: t for n, t in state.items() if n.endswith("_codes")}

    reference = codes(0)
    for k in (-40, -17, -1, 1, 23, 40):
        param, got = codes(k)
        assert_same(f"scale equivariance, k={k}", reference[1], got)
        assert_same(f"scale equivariance, k={k}", {"p": reference[0]}, {"p": param})


def locality(subject: Subject) -> None:
    """Law 6: a NaN or Inf in one gradient element affects that element only, and stays non-finite.

    With ``skip_nonfinite=True`` the step is skipped: nothing changes.
    """
    numel, indices = 3000, torch.tensor([0, 17, 2049], dtype=torch.int64, device="cpu")
    every = torch.ones(numel, dtype=torch.bool, device="cpu")
    others = subject.shaped(every.index_fill(0, indices, False))
    grads = [normal(numel, _generator(t)) for t in range(6)]
    small = [grad.index_fill(0, indices, 0.0) for grad in grads]
    for poison in (float("nan"), float("inf"), -float("inf")):
        bad = [g.index_fill(0, indices, poison) if t == 2 else g for t, g in enumerate(small)]
        clean_param = Parameter(subject.shaped(torch.ones_like(grads[0])))
        bad_param = Parameter(clean_param.detach().clone())
        clean = subject.make([clean_param], lr=LR)
        poisoned = subject.make([bad_param], lr=LR)
        _follow(clean, clean_param, small)
        _follow(poisoned, bad_param, bad)
        if not torch.equal(clean_param[others], bad_param[others]):
            raise AssertionError(f"locality: {poison} reached another parameter element")
        if torch.isfinite(bad_param[~others]).any():
            raise AssertionError(f"locality: {poison} became a finite parameter")
        expected = decode_state(clean, clean_param)
        for name, moment in decode_state(poisoned, bad_param).items():
            if name == "step":
                continue
            if not torch.equal(moment[others], expected[name][others]):
                raise AssertionError(f"locality: {poison} reached another element's {name}")
            if torch.isfinite(moment[~others]).any():
                raise AssertionError(f"locality: {poison} became a finite {name}")

    trainer = Trainer(lambda p: subject.make(p, skip_nonfinite=True), device=subject.device)
    before = trainer.run(3).tensors()
    for param in trainer.params:
        param.grad = torch.full_like(param, float("nan"))
    trainer.params[0].grad = torch.zeros_like(trainer.params[0])
    trainer.optimizer.step()
    assert_same("locality: skip_nonfinite", before, trainer.tensors())
