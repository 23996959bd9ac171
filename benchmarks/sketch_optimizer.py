"""AdamW whose moments are rounded in place, in fp32, as an optimizer that the study can train with.

The specifications are those of `sketches.py`. The step is compiled once for each of them.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from sketches import BLOCK, keys, make_m, make_v, uniform
from torch import Tensor


def split_options(spec: str) -> tuple[str, str, dict[str, float]]:
    """V, the levels and scale of M with rounding and flush, and M's further options."""
    v, m = spec.split(" | ")
    parts = m.split(",")
    own = 1 if parts[0] == "f" else 4
    options = {part[0]: float(part[1:] or 1) for part in parts[own:]}
    return v, ",".join(parts[:own]), options


@cache
def compiled_step(spec: str) -> Callable[..., tuple[Tensor, ...]]:
    """(u, r, noise, g, rounded blocks, index, key, scalars) -> new u, r, noise, and the update."""
    v, m_text, options = split_options(spec)
    exact = m_text == "f"
    round_v, round_m = make_v(v), None if exact else make_m(m_text)
    _, _, rounding, flush = m_text.split(",") if not exact else ("f", "", "", "0")
    shrink, hyperbolic, noisy = options.get("k"), options.get("h"), options.get("w")

    def step(u, kept, noise, g, chosen, index, key, scalars):
        b1, b2, correct_m, correct_r, eps, t = scalars
        m = b1 * u * kept + (1 - b1) * g
        root = (b2 * kept * kept + (1 - b2) * g * g).sqrt()
        kept = round_v(root, uniform(index, key[0]))
        denominator = root * correct_r + eps
        u = m / root.clamp(min=2.0**-63)
        now = m if hyperbolic is None else (1 - hyperbolic) * g + hyperbolic * m
        change = now * correct_m / denominator
        if noisy:
            rms = u.square().mean(1, keepdim=True).sqrt()
            drawn = noisy * rms * 3.4641 * (uniform(index, key[2]) - 0.5)
            change = change + (drawn - noise) * root / denominator
            noise = drawn
        if shrink is not None:
            rounded = (1 - shrink) * u
        elif exact:
            rounded = u
        else:
            r = torch.full_like(u, 0.5)
            if rounding == "p":
                # the second step of a pair has the complement of the first one's number
                odd = torch.remainder(t, 2)
                r = uniform(index, key[1]) * (1 - 2 * odd) + odd
            rounded = torch.where(kept > 0, round_m(u, r), 0.0)
        if "g" in options:
            rounded = u + (rounded - u) * torch.sign(uniform(index, key[2]) - 0.5)
        rounded = torch.where(chosen, rounded, u)
        residual = float(flush if shrink is None else 1) * b1 / (1 - b1) * (u - rounded) * root
        # not bias corrected: the residual would enter later steps, whose correction is smaller
        return rounded, kept, noise, change + residual / denominator

    return torch.compile(step, dynamic=False)


class SketchAdamW(torch.optim.Optimizer):
    """AdamW by a specification; ``params`` of one dtype, float32, all in one group.

    Args:
        params: the parameters. Those of at least 4,096 rows count as embeddings.
        spec: as in `sketches.py`.
        lr, betas, weight_decay: AdamW's; eps is 1e-8.
        seed: of the random numbers.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        spec: str,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.spec, self.seed, self.done = spec, seed, 0
        options = split_options(spec)[2]
        block = int(options.get("B", BLOCK))
        self.params = self.param_groups[0]["params"]
        # every tensor begins at a block's border, as in the engine
        self.sizes = [-(-p.numel() // block) * block for p in self.params]
        device = self.params[0].device
        self.p, self.g, self.u, self.r, self.noise = (
            torch.zeros(sum(self.sizes) // block, block, device=device) for _ in range(5)
        )
        self.index = torch.arange(sum(self.sizes), dtype=torch.int32, device=device).view(-1, block)
        self.chosen = torch.zeros(self.p.shape[0], 1, dtype=torch.bool, device=device)
        pieces = self.chosen.detach().split([size // block for size in self.sizes])
        for p, piece in zip(self.params, pieces, strict=True):
            embedding = p.ndim == 2 and p.shape[0] >= 4096
            piece.fill_(not options.get("o" if embedding else "e"))
        self.own = self.views(self.p)
        with torch.no_grad():
            torch._foreach_copy_(self.own, self.params)
        self.length = torch.zeros((), device=device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat vector that are a parameter's."""
        pairs = zip(self.params, flat.detach().view(-1).split(self.sizes), strict=True)
        return [values[: p.numel()].view(p.shape) for p, values in pairs]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step from the gradients that are there."""
        self.done += 1
        group, t = self.param_groups[0], self.done
        (beta1, beta2), lr = group["betas"], group["lr"]
        torch._foreach_copy_(self.views(self.g), [p.grad for p in self.params])
        corrections = [1 / (1 - beta1**t), (1 - beta2**t) ** -0.5]
        numbers = torch.tensor([beta1, beta2, *corrections, 1e-8, t])
        extra = keys(self.seed + 101, t)[:1]
        key = torch.cat([keys(self.seed, t), extra]).pin_memory()
        scalars = numbers.pin_memory().to(self.p.device, non_blocking=True).unbind(0)
        key = key.to(self.p.device, non_blocking=True)
        self.u, self.r, self.noise, change = compiled_step(self.spec)(
            self.u, self.r, self.noise, self.g, self.chosen, self.index, key, scalars
        )
        self.length += change.square().mean().sqrt()
        self.p.mul_(1 - lr * group["weight_decay"]).sub_(change, alpha=lr)
        torch._foreach_copy_(self.params, self.own)
