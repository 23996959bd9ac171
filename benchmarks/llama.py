"""A model of Llama's kind in plain torch, with random weights made on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """Sizes; ``kv`` heads of keys and values serve ``heads`` of queries."""

    width: int
    inside: int
    layers: int
    heads: int
    kv: int
    vocabulary: int = 32_000


IGNORED = -100
CONFIGS = {
    "tiny": Config(32, 64, 2, 4, 2, 64),
    "1b": Config(2048, 5632, 22, 32, 4),
    "7b": Config(4096, 11008, 32, 32, 32),
    "13b": Config(5120, 13824, 40, 40, 40),
    "70b": Config(8192, 28672, 80, 64, 8),
    # Llama 3: a vocabulary four times as large, whose embedding and head are a billion parameters
    "8b": Config(4096, 14336, 32, 32, 8, 128_256),
}


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions; x is [batch, heads, tokens, size]."""
    one, two = x.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((one * cos - two * sin, one * sin + two * cos), -1).to(x.dtype)


class Layer(nn.Module):
    """Attention and a gated linear unit, each after a norm and added to what came in."""

    def __init__(self, config: Config, **where: object) -> None:
        super().__init__()
        self.config = config
        width, inside = config.width, config.inside
        keys = width // config.heads * config.kv

        def linear(a: int, b: int) -> nn.Linear:
            return nn.Linear(a, b, bias=False, **where)  # type: ignore[arg-type]

        self.q, self.k, self.v = linear(width, width), linear(width, keys), linear(width, keys)
        self.o = linear(width, width)
        self.gate, self.up = linear(width, inside), linear(width, inside)
        self.down = linear(inside, width)
        self.before = nn.RMSNorm(width, eps=1e-5, **where)  # type: ignore[arg-type]
        self.between = nn.RMSNorm(width, eps=1e-5, **where)  # type: ignore[arg-type]

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads, kv = self.config.heads, self.config.kv
        y = self.before(x)
        q = self.q(y).view(batch, tokens, heads, -1).transpose(1, 2)
        k = self.k(y).view(batch, tokens, kv, -1).transpose(1, 2)
        v = self.v(y).view(batch, tokens, kv, -1).transpose(1, 2)
        k = rotate(k, angles).repeat_interleave(heads // kv, 1)
        v = v.repeat_interleave(heads // kv, 1)
        y = F.scaled_dot_product_attention(rotate(q, angles), k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, tokens, width))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """The model; ``forward`` is the loss of predicting each token from those before.

    Args:
        config: its sizes.
        checkpointed: compute each layer again in the backward pass.
        loss_tokens: compute the logits of so many tokens at a time, and again in the backward pass;
            None: all at once.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        checkpointed: bool = False,
        loss_tokens: int | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.checkpointed, self.loss_tokens = checkpointed, loss_tokens
        self.embed = nn.Embedding(config.vocabulary, config.width, **where)  # type: ignore[arg-type]
        self.layers = nn.ModuleList([Layer(config, **where) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(config.width, eps=1e-5, **where)  # type: ignore[arg-type]
        self.head = nn.Linear(config.width, config.vocabulary, bias=False, **where)  # type: ignore[arg-type]
        half = config.width // config.heads // 2
        self.pace = 1e4 ** (-torch.arange(half, device=device) / half)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        angles = torch.arange(tokens.shape[1], device=x.device)[:, None] * self.pace
        for layer in self.layers:
            if self.checkpointed:
                x = checkpoint(layer, x, angles, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, angles)
        # nothing follows the last token
        after = F.pad(tokens[:, 1:], (0, 1), value=IGNORED).flatten()
        x = self.norm(x).flatten(0, 1)
        count = tokens[:, 1:].numel()
        if self.loss_tokens is None:
            return self.loss(x, after) / count
        parts = zip(x.split(self.loss_tokens), after.split(self.loss_tokens), strict=True)
        losses = [checkpoint(self.loss, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum() / count

    def loss(self, x: Tensor, after: Tensor) -> Tensor:
        """The sum of the losses of predicting ``after`` from ``x``, [tokens, width]."""
        logits = self.head(x).float()
        return F.cross_entropy(logits, after, ignore_index=IGNORED, reduction="sum")
