"""A byte-level GPT of a few hundred thousand parameters, written to be read.

Pre-norm blocks, rotary positions, causal attention with heads of 32, tied embedding. It predicts
the next byte, so there is no tokenizer and no vocabulary file.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256
HEAD = 32
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Used for every weight, so that a run does not depend on torch's defaults."""


def rotary_table(context: int) -> Tensor:
    """Cosines and sines of the rotary positions, shape (2, context, HEAD / 2)."""
    frequency = 10_000.0 ** (-torch.arange(0, HEAD, 2, **FLOAT32) / HEAD)
    angle = torch.arange(context, **FLOAT32)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the pairs of each head by their position: x of shape (..., context, HEAD)."""
    cos, sin = table[:, : x.shape[-2]]
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class Attention(nn.Module):
    """Causal self-attention over x of shape (batch, context, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False, **FLOAT32)
        self.out = nn.Linear(width, width, bias=False, **FLOAT32)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Mixes each position with the positions before it."""
        heads = self.qkv(x).unflatten(-1, (3, -1, HEAD))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            rotate(q, table), rotate(k, table), v, is_causal=True
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on a normalised residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, **FLOAT32)
        self.attention = Attention(width)
        self.norm_mlp = nn.LayerNorm(width, **FLOAT32)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, **FLOAT32),
            nn.GELU(),
            nn.Linear(4 * width, width, **FLOAT32),
        )

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Adds the attention's and the perceptron's output to the residual stream."""
        x = x + self.attention(self.norm_attention(x), table)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class ByteGPT(nn.Module):
    """Next-byte logits of shape (batch, context, 256) for int64 bytes of shape (batch, context).

    Args:
        width: Size of the residual stream, a multiple of 32.
        depth: Number of blocks.
        context: Longest sequence.
    """

    rotary: Tensor

    def __init__(self, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width, **FLOAT32)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, **FLOAT32)
        self.register_buffer("rotary", rotary_table(context), persistent=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the byte after each position."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotary)
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, sequences: Tensor) -> Tensor:
        """Mean cross-entropy in nats of every next byte in int64 (batch, context + 1)."""
        logits = self(sequences[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
