"""A language model with a BPE vocabulary of 8,192, plain or modern, on the text of `corpus.py`.

Plain is GPT-2's block: LayerNorm, GELU, learned positions, biases. Modern is Llama's: RMSNorm,
SwiGLU, rotary positions, no biases. Both have heads of 64 and tie the embedding to the output.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 8192
HEAD = 64


@dataclass(frozen=True)
class Shape:
    """The size of a model; ``modern`` chooses the block."""

    width: int
    depth: int
    context: int
    modern: bool


def rotated(x: Tensor) -> Tensor:
    """Queries or keys with rotary positions, base 10,000; [batch, heads, context, HEAD]."""
    frequency = 10_000.0 ** (-torch.arange(0, HEAD, 2, device=x.device) / HEAD)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1).to(x.dtype)


class Block(nn.Module):
    """Attention and a perceptron, each on the normalized residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.modern = shape.width, shape.modern
        norm, bias = (nn.RMSNorm, False) if shape.modern else (nn.LayerNorm, True)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        # three matrices of 8/3 width have as many parameters as two of 4 width
        hidden = -(-8 * width // 3 // 64) * 64 if shape.modern else 4 * width
        self.up = nn.Linear(width, hidden * (2 if shape.modern else 1), bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, context, width] to the same."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if self.modern:
            q, k = rotated(q), rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        hidden = self.up(self.norm2(x))
        if self.modern:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return x + self.down(hidden)


class Language(nn.Module):
    """Next-token logits; the initial weights come from ``seed``."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.positions = None if shape.modern else nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = (nn.RMSNorm if shape.modern else nn.LayerNorm)(shape.width)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / (2 * shape.depth) ** 0.5 if last else 0.02
                nn.init.normal_(p, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy, nats a token, of int64 tokens [batch, context + 1]."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.embedding(inputs)
        if self.positions is not None:
            x = x + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def sequences(tokens: np.ndarray, batch: int, context: int, seed: int) -> Tensor:
    """Where sequences begin: [batches, batch], each window of the text once, shuffled."""
    count = (len(tokens) - 1) // context // batch * batch
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.view(-1, batch) * context
