"""The fidelity lab: measures how far an optimizer's updates are from exact Adam's over many steps.

State is read, updated and rewritten every step, so a format is judged by its updates after many
steps, not by one round trip. Optimizers and an Adam in float64 get the same gradients, drawn
independently of the parameters. Each kind of gradient is a span of one vector, or a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs.testing.subject import moments_of, normal, second_moments

__all__ = ["GRADIENTS", "Fidelity", "Stops", "compare", "gradients", "stops"]

BETA1, EPS = 0.9, 1e-8
# elements of a row of the kinds that are sparse by rows, as embeddings are, and the step at which
# sleeping rows wake
ROW, WAKES = 64, 1000

Make = Callable[..., Any]


def _zipf_rows(noise: Tensor, own: Tensor, chance: Tensor, step: int) -> Tensor:
    """Row n gets a gradient with probability 1 / n, as the rows of an embedding do."""
    row = torch.arange(noise.numel(), dtype=torch.int64, device="cpu") // ROW
    return noise * (chance[row * ROW] * (row + 1) < 1)


def _waking_rows(noise: Tensor, own: Tensor, chance: Tensor, step: int) -> Tensor:
    """Every other row gets its first gradient after ``WAKES`` steps."""
    row = torch.arange(noise.numel(), dtype=torch.int64, device="cpu") // ROW
    return noise * ((row % 2 == 0) | (step >= WAKES))


# of normal noise, a normal number of each element's own, a uniform number, and the step
Gradient = Callable[[Tensor, Tensor, Tensor, int], Tensor]
#: kinds of gradients
GRADIENTS: dict[str, Gradient] = {
    "dense": lambda noise, own, chance, step: noise,
    "5 % sparse": lambda noise, own, chance, step: noise * (chance < 0.05),
    "drifting": lambda noise, own, chance, step: noise + own * math.sin(step / 80),
    "bursty": lambda noise, own, chance, step: noise * (10 if step // 20 % 10 == 0 else 1),
    "log-normal 1": lambda noise, own, chance, step: noise * own.exp(),
    "log-normal 2": lambda noise, own, chance, step: noise * (2 * own).exp(),
    "Zipf rows": _zipf_rows,
    "waking rows": _waking_rows,
}


@dataclass(frozen=True)
class Fidelity:
    """Measures of an optimizer's updates u_q against exact Adam's u.

    Gain, error and cosine are over the last steps.

    Attributes:
        gain: <u_q, u> / <u, u>: 1 for steps of the right length.
        error: |u_q - u| / |u|.
        cosine: of the angle between u_q and u.
        log_bias: mean of ln sqrt(v_q / v) at the end, over elements that had a gradient.
        log_spread: standard deviation of ln sqrt(v_q / v).
        path: |sum (u_q - u)| / |sum u| over all steps: the final distance of the parameters.
        longest: the largest |u_q| of any element at any step, in units of the learning rate.
    """

    gain: float
    error: float
    cosine: float
    log_bias: float
    log_spread: float
    path: float
    longest: float


def gradients(
    kinds: Sequence[str], steps: int, numel: int, seed: int = 0, rows: int = 1
) -> Iterator[Tensor]:
    """``numel`` elements of each kind, one kind after the other, for each of ``steps`` steps.

    With ``rows``, an element's own number is the sum of its row's and its column's over sqrt(2).
    """
    generator = torch.Generator().manual_seed(seed)
    own = normal(numel, generator)
    if rows > 1:
        by_row, by_column = own[:rows].view(-1, 1), own[rows : rows + numel // rows]
        own = ((by_row + by_column) / math.sqrt(2)).view(-1)
    for step in range(steps):
        noise = normal(numel, generator)
        chance = torch.rand(numel, generator=generator, dtype=torch.float32, device="cpu")
        yield torch.cat([GRADIENTS[kind](noise, own, chance, step) for kind in kinds])


class _Exact:
    """Adam in float64, from its formula."""

    def __init__(self, beta2: float) -> None:
        self.beta2 = beta2
        self.step = 0
        self.m = self.v = torch.zeros((), dtype=torch.float64, device="cpu")

    def update(self, grad: Tensor) -> Tensor:
        self.step += 1
        grad = grad.double()
        self.m = BETA1 * self.m + (1 - BETA1) * grad
        self.v = self.beta2 * self.v + (1 - self.beta2) * grad * grad
        root = (self.v / (1 - self.beta2**self.step)).sqrt()
        return self.m / (1 - BETA1**self.step) / (root + EPS)


class _Coded:
    """An optimizer and the sums over its updates, all of shape [kinds, elements]."""

    def __init__(
        self, make: Make, beta2: float, shape: tuple[int, int], device: str, rows: int = 1
    ) -> None:
        self.shape = shape
        # spans of one vector, or a matrix for each kind
        sizes = [(shape[0] * shape[1],)] if rows == 1 else [(rows, shape[1] // rows)] * shape[0]
        zeros = [torch.zeros(size, dtype=torch.float32, device=device) for size in sizes]
        self.params = [Parameter(zero) for zero in zeros]
        self.optimizer = make(self.params, lr=1.0, betas=(BETA1, beta2), eps=EPS, weight_decay=0.0)
        self.sums = torch.zeros(4, shape[0], dtype=torch.float64, device="cpu")
        self.path = torch.zeros(shape, dtype=torch.float64, device="cpu")
        self.longest = torch.zeros(shape[0], dtype=torch.float64, device="cpu")

    def update(self, grad: Tensor) -> Tensor:
        for param, part in zip(self.params, grad.chunk(len(self.params)), strict=True):
            param.detach().zero_()
            param.grad = part.to(param.device).view_as(param)
        self.optimizer.step()
        return -self._joined([param.detach() for param in self.params]).view(self.shape)

    @staticmethod
    def _joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in parts]).cpu().double()

    def follow(self, grad: Tensor, exact: Tensor, compared: bool) -> None:
        update = self.update(grad)
        apart = update - exact
        self.path += apart
        self.longest = torch.maximum(self.longest, update.abs().amax(1))
        if compared:
            pairs = ((update, exact), (exact, exact), (apart, apart), (update, update))
            self.sums += torch.stack([(a * b).sum(1) for a, b in pairs])

    def results(self, exact: Tensor, path: Tensor) -> Iterator[Fidelity]:
        """One for each kind; ``exact`` is the second moment, ``path`` the sum of exact updates."""
        states = [moments_of(self.optimizer, param) for param in self.params]
        second = second_moments(self.optimizer)[0]
        stored = self._joined([state[second] for state in states])
        logs = (stored / exact).log().view(self.shape) / 2
        for i, (along, squared, apart, own) in enumerate(self.sums.T.tolist()):
            log = logs[i][logs[i].isfinite()]
            yield Fidelity(
                gain=along / squared,
                error=(apart / squared) ** 0.5,
                cosine=along / (squared * own) ** 0.5,
                log_bias=float(log.mean()),
                log_spread=float(log.std()),
                path=float(self.path[i].norm() / path[i].norm()),
                longest=float(self.longest[i]),
            )


def compare(
    makes: Mapping[str, Make],
    beta2: float,
    kinds: Sequence[str] = tuple(GRADIENTS),
    *,
    steps: int = 3000,
    last: int = 100,
    numel: int = 4096,
    seed: int = 0,
    rows: int = 1,
    device: str = "cpu",
    advance: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Fidelity]]:
    """Compare optimizers with exact Adam at beta1 = 0.9, eps = 1e-8.

    Args:
        makes: optimizers by name, each built from a list of parameters and keyword arguments.
        beta2: decay of the second moment.
        kinds: of gradients, from ``GRADIENTS``.
        steps: the number of steps.
        last: the number of last steps for gain, error and cosine.
        numel: elements for each kind; a multiple of the block size keeps blocks of one kind.
        seed: of the gradients.
        rows: above 1: a matrix of that many rows for each kind, whose log-normal scales and
            drifting means belong to rows and columns; a divisor of ``numel``, below it.
        device: where the optimizers run.
        advance: called after each step of all optimizers.

    Returns:
        ``[name][kind]``.

    Examples:
        >>> (found,) = compare({"8-bit": AdamW8bit}, 0.999, ["dense"], steps=300).values()
        >>> found["dense"].gain
    """
    shape = (len(kinds), numel)
    exact = _Exact(beta2)
    coded = {name: _Coded(make, beta2, shape, device, rows) for name, make in makes.items()}
    path = torch.zeros(shape, dtype=torch.float64, device="cpu")
    for step, grad in enumerate(gradients(kinds, steps, numel, seed, rows)):
        update = exact.update(grad).view(shape)
        path += update
        for one in coded.values():
            one.follow(grad, update, step >= steps - last)
        advance()
    return {
        name: dict(zip(kinds, one.results(exact.v, path), strict=True))
        for name, one in coded.items()
    }


@dataclass(frozen=True)
class Stops:
    """Movement of elements without gradients in blocks with others that have them, in lr.

    Attributes:
        still: the largest distance moved by an element that never had a gradient.
        drift: root mean square distance from exact Adam's of elements whose gradient stopped.
    """

    still: float
    drift: float


def stops(make: Make, beta2: float = 0.999, steps: int = 1200, numel: int = 4096) -> Stops:
    """Of four elements, one never has a gradient, and one only in the first sixth of the steps."""
    exact, coded = _Exact(beta2), _Coded(make, beta2, (1, numel), "cpu")
    moved = torch.zeros(2, numel, dtype=torch.float64, device="cpu")
    member = torch.arange(numel, dtype=torch.int64, device="cpu") % 4
    for step, grad in enumerate(gradients(["dense"], steps, numel)):
        late = step >= steps // 6
        grad = grad * ((member > 1) | ((member == 1) & (not late)))
        update, own = exact.update(grad), coded.update(grad).view(-1)
        moved += torch.stack([own.abs(), (own - update) * late])
    return Stops(
        still=float(moved[0][member == 0].max()),
        drift=float(moved[1][member == 1].square().mean().sqrt()),
    )
