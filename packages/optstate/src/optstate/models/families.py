"""The parameters of three families of models, from the sizes in their published configurations."""

from dataclasses import dataclass, replace
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Llama:
    """Llama, Mistral, Qwen2.5 and Qwen3: gated MLP, RMSNorm, grouped keys and values.

    Attributes:
        hidden: model width.
        layers: number of blocks.
        heads: attention heads.
        kv_heads: heads of keys and values.
        inside: width of the MLP.
        vocabulary: tokens.
        tied: whether the output layer is the embedding.
        qkv_bias: whether the projections to queries, keys and values have biases.
        head: size of a head; 0: ``hidden // heads``.
        qk_norm: whether queries and keys have norms, one for all heads each.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inside: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False
    head: int = 0
    qk_norm: bool = False

    def shapes(self) -> list[Shape]:
        """The shape of every parameter, in the model's order."""
        head = self.head or self.hidden // self.heads
        queries, keys = head * self.heads, head * self.kv_heads
        layer: list[Shape] = [(queries, self.hidden), (keys, self.hidden), (keys, self.hidden)]
        layer += [(queries,), (keys,), (keys,)] if self.qkv_bias else []
        layer += [(self.hidden, queries)]
        layer += [(head,), (head,)] if self.qk_norm else []
        layer += [(self.inside, self.hidden), (self.inside, self.hidden)]
        layer += [(self.hidden, self.inside), (self.hidden,), (self.hidden,)]
        embedding = (self.vocabulary, self.hidden)
        output = [] if self.tied else [embedding]
        return [embedding, *layer * self.layers, (self.hidden,), *output]


@dataclass(frozen=True)
class GPT2:
    """GPT-2: learned positions, biases everywhere, the output layer tied to the embedding.

    Attributes:
        hidden: model width; the MLP is four times as wide.
        layers: number of blocks.
        vocabulary: tokens.
        context: positions.
    """

    hidden: int
    layers: int
    vocabulary: int = 50257
    context: int = 1024

    def shapes(self) -> list[Shape]:
        """The shape of every parameter, in the model's order."""
        n = self.hidden
        layer: list[Shape] = [(n,), (n,), (n, 3 * n), (3 * n,), (n, n), (n,)]
        layer += [(n,), (n,), (n, 4 * n), (4 * n,), (4 * n, n), (n,)]
        return [(self.vocabulary, n), (self.context, n), *layer * self.layers, (n,), (n,)]


@dataclass(frozen=True)
class ViT:
    """Vision Transformer with a linear classifier.

    Attributes:
        hidden: model width.
        layers: number of blocks.
        inside: width of the MLP.
        patch: pixels of a patch's side.
        image: pixels of an image's side.
        classes: outputs of the classifier.
    """

    hidden: int
    layers: int
    inside: int
    patch: int
    image: int = 224
    classes: int = 1000

    def shapes(self) -> list[Shape]:
        """The shape of every parameter, in the model's order."""
        n, inside = self.hidden, self.inside
        tokens = (self.image // self.patch) ** 2 + 1
        layer: list[Shape] = [(n,), (n,), (n, n), (n,), (n, n), (n,), (n, n), (n,), (n, n), (n,)]
        layer += [(n,), (n,), (inside, n), (inside,), (n, inside), (n,)]
        first: list[Shape] = [(1, 1, n), (1, tokens, n), (n, 3, self.patch, self.patch), (n,)]
        return [*first, *layer * self.layers, (n,), (n,), (self.classes, n), (self.classes,)]


Family = Llama | GPT2 | ViT

NAMED: dict[str, Family] = {
    # config.json of openai-community/gpt2, gpt2-medium, gpt2-large, gpt2-xl
    "gpt2": GPT2(768, 12),
    "gpt2-medium": GPT2(1024, 24),
    "gpt2-large": GPT2(1280, 36),
    "gpt2-xl": GPT2(1600, 48),
    # config.json of meta-llama/Llama-2-7b-hf, Llama-2-13b-hf, Llama-2-70b-hf
    "llama-2-7b": Llama(4096, 32, 32, 32, 11008, 32000),
    "llama-2-13b": Llama(5120, 40, 40, 40, 13824, 32000),
    "llama-2-70b": Llama(8192, 80, 64, 8, 28672, 32000),
    # config.json of meta-llama/Meta-Llama-3-8B and Meta-Llama-3-70B; 3.1 has the same shapes
    "llama-3-8b": Llama(4096, 32, 32, 8, 14336, 128256),
    "llama-3-70b": Llama(8192, 80, 64, 8, 28672, 128256),
    # config.json of meta-llama/Llama-3.2-1B and Llama-3.2-3B
    "llama-3.2-1b": Llama(2048, 16, 32, 8, 8192, 128256, tied=True),
    "llama-3.2-3b": Llama(3072, 28, 24, 8, 8192, 128256, tied=True),
    # config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0
    "tinyllama-1.1b": Llama(2048, 22, 32, 4, 5632, 32000),
    # config.json of mistralai/Mistral-7B-v0.1 and Mistral-7B-v0.3
    "mistral-7b": Llama(4096, 32, 32, 8, 14336, 32000),
    "mistral-7b-v0.3": Llama(4096, 32, 32, 8, 14336, 32768),
    # config.json of Qwen/Qwen2.5-0.5B to Qwen2.5-72B
    "qwen2.5-0.5b": Llama(896, 24, 14, 2, 4864, 151936, tied=True, qkv_bias=True),
    "qwen2.5-1.5b": Llama(1536, 28, 12, 2, 8960, 151936, tied=True, qkv_bias=True),
    "qwen2.5-3b": Llama(2048, 36, 16, 2, 11008, 151936, tied=True, qkv_bias=True),
    "qwen2.5-7b": Llama(3584, 28, 28, 4, 18944, 152064, qkv_bias=True),
    "qwen2.5-14b": Llama(5120, 48, 40, 8, 13824, 152064, qkv_bias=True),
    "qwen2.5-32b": Llama(5120, 64, 40, 8, 27648, 152064, qkv_bias=True),
    "qwen2.5-72b": Llama(8192, 80, 64, 8, 29568, 152064, qkv_bias=True),
    # config.json of Qwen/Qwen3-0.6B and Qwen3-8B
    "qwen3-0.6b": Llama(1024, 28, 16, 8, 3072, 151936, tied=True, head=128, qk_norm=True),
    "qwen3-8b": Llama(4096, 36, 32, 8, 12288, 151936, head=128, qk_norm=True),
    # Dosovitskiy et al., arXiv:2010.11929, table 1, with a classifier of 1000 classes
    "vit-b": ViT(768, 12, 3072, patch=16),
    "vit-l": ViT(1024, 24, 4096, patch=16),
    "vit-h": ViT(1280, 32, 5120, patch=14),
}
"""Sizes by the name that the command line takes."""


def named_shapes(name: str, layers: int | None = None) -> list[Shape]:
    """The shape of every parameter of a model.

    Args:
        name: a key of `NAMED`.
        layers: replaces the model's number of blocks; at least 1.

    Example:
        >>> sum(map(prod, named_shapes("gpt2")))
        124439808
    """
    family = NAMED[name]
    return (family if layers is None else replace(family, layers=layers)).shapes()


def numel(shapes: list[Shape]) -> int:
    """Elements of all shapes together."""
    return sum(map(prod, shapes))
