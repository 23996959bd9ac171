"""Laws 1 to 7, on the numbers that an optimizer computes."""

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
from optstate_codecs.testing.subject import (
    Subject,
    assert_same,
    moments_of,
    normal,
    plain,
    second_moments,
)

__all__ = [
    "exactness",
    "locality",
    "positive_stays_positive",
    "same_bits",
    "scale_equivariance",
    "unbiased_length",
    "zero_stays",
]

LR = 1e-2


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _follow(subject: Subject, optimizer: Any, param: Parameter, grads: Sequence[Tensor]) -> None:
    for grad in grads:
        param.grad = subject.gradient(grad)
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
        ours = subject.trainer(partial(_grouped, subject.make, options)).run(40)
        theirs = subject.trainer(partial(_grouped, subject.exact, options), mesh=None).run(40)
        expected, got = theirs.tensors(), ours.tensors()
        if not any(key.endswith(" step") for key in expected):
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
    start = normal(numel, _generator())
    still = torch.arange(numel, dtype=torch.int64, device="cpu") % 2 == 0
    param, exact = subject.parameter(start), Parameter(start.double())
    first = plain(param).clone()
    ours = subject.make([param], lr=lr, weight_decay=0.0)
    compared = subject.near is not None and subject.wide
    reference = subject.near([exact], lr=lr) if compared else None  # type: ignore[misc]
    noise = _generator(1)
    stopped = first, start.double()
    for step in range(1050):
        if step == 50:
            stopped = plain(param).clone(), exact.detach().clone()
        grad = normal(numel, noise) * (step < 50) * ~still
        _follow(subject, ours, param, [grad])
        if reference is not None:
            exact.grad = grad.double()
            reference.step()
    unmoved = subject.shaped(still)
    if not torch.equal(plain(param)[unmoved], first[unmoved]):
        raise AssertionError("zero stays: an element without gradient moved")
    if reference is None:
        return
    moved, due = plain(param) - stopped[0], exact.detach() - stopped[1]
    drift = float((moved.cpu().view(-1) - due).abs().max()) / lr
    if not drift <= subject.drift:
        raise AssertionError(f"zero stays: drifted {drift:.3g} lr, at most {subject.drift:g}")


def positive_stays_positive(subject: Subject) -> None:
    """Law 3: a second moment above zero stays above zero, and steps keep to a bound.

    Gradients whose second moments spread log-normally, sigma 2, inside each block; 200 steps, each
    from zero.
    """
    numel = 8192
    spread = torch.exp(normal(numel, _generator()))
    noise = _generator(1)
    param = subject.parameter(torch.zeros_like(spread))
    optimizer = subject.make([param], lr=LR, weight_decay=0.0)
    longest = 0.0
    for _ in range(200):
        plain(param).zero_()
        _follow(subject, optimizer, param, [normal(numel, noise) * spread])
        longest = max(longest, float(plain(param).abs().max()) / LR)
    moments = moments_of(optimizer, param)
    for name in second_moments(optimizer):
        if not (moments[name] > 0).all():
            raise AssertionError(f"positive stays positive: {name} holds a zero")
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
        param = subject.parameter(torch.ones_like(grads[0]))
        optimizer = subject.make([param], lr=LR, weight_decay=0.0)
        for group in optimizer.param_groups:
            if "eps" in group:
                group["eps"] = math.ldexp(eps, k)
        _follow(subject, optimizer, param, [grad * 2.0**k for grad in grads])
        state = optimizer.state[param]
        return plain(param), {n: t for n, t in state.items() if n.endswith("_codes")}

    reference = codes(0)
    for k in (-40, -17, -1, 1, 23, 40):
        param, got = codes(k)
        assert_same(f"scale equivariance, k={k}", reference[1], got)
        assert_same(f"scale equivariance, k={k}", {"p": reference[0]}, {"p": param})


def locality(subject: Subject) -> None:
    """Law 6: a NaN or Inf in one gradient element affects that element only, and stays non-finite.

    With ``skip_nonfinite=True``, which optimizers of the family have, the step is skipped: nothing
    changes.
    """
    numel, indices = 3000, torch.tensor([0, 17, 2049], dtype=torch.int64, device="cpu")
    every = torch.ones(numel, dtype=torch.bool, device="cpu")
    others = subject.shaped(every.index_fill(0, indices, False))
    grads = [normal(numel, _generator(t)) for t in range(6)]
    small = [grad.index_fill(0, indices, 0.0) for grad in grads]

    def stepped(grads: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        param = subject.parameter(torch.ones_like(grads[0]))
        optimizer = subject.make([param], lr=LR)
        _follow(subject, optimizer, param, grads)
        return plain(param), moments_of(optimizer, param)

    clean, expected = stepped(small)
    for poison in (float("nan"), float("inf"), -float("inf")):
        bad = [g.index_fill(0, indices, poison) if t == 2 else g for t, g in enumerate(small)]
        found, moments = stepped(bad)
        if not torch.equal(clean[others], found[others]):
            raise AssertionError(f"locality: {poison} reached another parameter element")
        if torch.isfinite(found[~others]).any():
            raise AssertionError(f"locality: {poison} became a finite parameter")
        for name, moment in moments.items():
            if not torch.equal(moment[others], expected[name][others]):
                raise AssertionError(f"locality: {poison} reached another element's {name}")
            if torch.isfinite(moment[~others]).any():
                raise AssertionError(f"locality: {poison} became a finite {name}")

    trainer = subject.trainer()
    if not isinstance(trainer.optimizer, CodedOptimizer):
        return
    trainer = subject.trainer(partial(subject.make, skip_nonfinite=True))
    before = trainer.run(3).tensors()
    for param in trainer.params:
        param.grad = torch.full_like(param, float("nan"))
    trainer.params[0].grad = torch.zeros_like(trainer.params[0])
    trainer.optimizer.step()
    assert_same("locality: skip_nonfinite", before, trainer.tensors())


def same_bits(
    subject: Subject, shapes: Sequence[Sequence[int]] = ((11, 83), (129,), (1,), (0,), ())
) -> None:
    """Law 7: every backend and store gives the bits of ``subject.reference``.

    Where ``subject.mismatches`` allows some, each step begins with the reference's state, so that
    one different rounding is counted once; codes then differ by a level at most, and other numbers
    by rounding.
    """
    if subject.reference is None:
        raise ValueError(f"{subject.name}: same bits need the reference whose they are")
    reference = subject.trainer(subject.reference, shapes, device="cpu", mesh=None)
    other = subject.trainer(shapes=shapes)
    counts = [0, 0]
    for _ in range(4):
        expected, got = reference.run(1).tensors(), other.run(1).tensors()
        if not subject.mismatches:
            assert_same("same bits", expected, {key: value.cpu() for key, value in got.items()})
            continue
        _compare_codes(expected, got, counts)
        other.optimizer.load_state_dict(reference.optimizer.state_dict())
        for mine, theirs in zip(other.params, reference.params, strict=True):
            plain(mine).copy_(plain(theirs))
    if counts[1] > max(2, subject.mismatches * counts[0]):
        raise AssertionError(f"same bits: {counts[1]} of {counts[0]} codes differ")


def _compare_codes(
    expected: dict[str, Tensor], found: dict[str, Tensor], counts: list[int]
) -> None:
    """Count codes and those that differ; raise where they differ by more than a level."""
    if expected.keys() != found.keys():
        raise AssertionError(f"same bits: {sorted(expected)} became {sorted(found)}")
    for key, due in expected.items():
        got = found[key].cpu()
        if due.dtype == torch.uint8:
            apart = (got.int() - due.int()).abs()
            counts[0], counts[1] = counts[0] + due.numel(), counts[1] + int((apart > 0).sum())
            # a level is a power of two where a byte holds several codes
            if (apart & (apart - 1)).any():
                raise AssertionError(f"same bits: {key} differs by more than a level")
        elif not key.endswith("_correction"):
            torch.testing.assert_close(got, due, rtol=1e-2, atol=2e-6, equal_nan=True, msg=key)
