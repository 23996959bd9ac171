"""Counter-based random numbers and stochastic rounding.

Random bits are a pure function of (seed, step, parameter, stream, element). So no generator state
is stored, every device gives the same bits, and a resumed run draws the same bits as an
uninterrupted one.

The hash is two rounds of multiply-xorshift over 32 bits, with the constants of Wellons' search for
low-bias integer hashes (https://nullprogram.com/blog/2018/07/31/), keyed before each round. One
32-bit word serves two 16-bit streams of two neighbouring elements: a stream has the low half for
one element and the high half for the other. An odd step's words are those of the even step before,
with one more multiplication at the end, so that computing both is cheap. The multiplier is
L'Ecuyer's (Math. Comp. 68, 1999, table 5), as in PCG.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from optstate_codecs.tables import cached_table, in_mode

__all__ = ["Counter", "Draw", "stochastic_round_bf16"]

MASK = 0xFFFFFFFF
M1 = 0x7FEB352D
M2 = 0x846CA68B
GOLDEN = 0x9E3779B9
ODD = 747796405
BF16_MAX = torch.finfo(torch.bfloat16).max


def mix32(x: int) -> int:
    """Hash one 32-bit integer on the host (Wellons' lowbias32)."""
    x &= MASK
    x = ((x ^ (x >> 16)) * M1) & MASK
    x = ((x ^ (x >> 15)) * M2) & MASK
    return x ^ (x >> 16)


def stream_key(seed: int, param: int, word: int) -> tuple[int, int]:
    """The step-independent part of a key: two 32-bit integers."""
    keys = []
    for salt in (GOLDEN, M1):
        key = mix32(salt ^ seed)
        for part in (seed >> 32, param, param >> 32, word):
            key = mix32(key + part)
        keys.append(key)
    return keys[0], keys[1]


@lru_cache(maxsize=1 << 14)
def packed_key(seed: int, param: int, word: int) -> int:
    """``stream_key`` for a kernel's table: an int64 with the first integer in the low half."""
    low, high = stream_key(seed, param, word)
    return (low | high << 32) - (high >> 31 << 64)


def step_key(key: tuple[int, int], step: int) -> tuple[int, int]:
    """Fold the step count into a stream key; kernels do the same on the device."""
    step &= ~1
    return mix32(key[0] + step), mix32(key[1] ^ (step * GOLDEN))


def _signed(x: int) -> int:
    """The int32 with the same bits as the unsigned ``x``."""
    x &= MASK
    return x - (1 << 32) if x >> 31 else x


def hash_words(
    key: tuple[int, int], odd: bool, start: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Words ``start`` to ``start + count`` (int32, shape [count]) of an even or an odd step.

    Word indices have 64 bits; their high half is added to the second key.
    """
    border = (start | MASK) + 1
    if start + count > border:
        head = hash_words(key, odd, start, border - start, device)
        return torch.cat([head, hash_words(key, odd, border, start + count - border, device)])
    # int32 wraps around as the hash needs, and takes half the memory of int64
    x = _counting(count, torch.device(device)) + _signed(start + key[0])
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(M1))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x.add_(_signed(key[1] + (start >> 32) * GOLDEN)).mul_(_signed(M2 * ODD if odd else M2))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


@cached_table(maxsize=4)
def _cpu_counting(limit: int) -> Tensor:
    return torch.arange(limit, dtype=torch.int32, device="cpu")


def _counting(count: int, device: torch.device) -> Tensor:
    """0, 1, ... count - 1 as int32, read-only; cached on the CPU up to 2^16."""
    if device.type == "cpu" and count <= 1 << 16 and not in_mode():
        return _cpu_counting(1 << 16)[:count]
    return torch.arange(count, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Draw:
    """The random bits of one stream of one parameter at one step.

    Streams 2w and 2w + 1 share their words. Element e has word e // 2: stream 2w takes its low
    half where e is even and its high half where e is odd, and stream 2w + 1 the other half.
    """

    seed: int
    step: int
    param: int
    stream: int
    start: int = 0

    def at(self, start: int) -> Draw:
        """The same stream, with element ``start`` as element 0."""
        return Draw(self.seed, self.step, self.param, self.stream, self.start + start)

    def bits16(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Integers in [0, 65535], int32, shape [count]."""
        key = step_key(stream_key(self.seed, self.param, self.stream // 2), self.step)
        first = self.start // 2
        number = (self.start + count + 1) // 2 - first
        words = hash_words(key, self.step % 2 == 1, first, number, device)
        halves = [words & 0xFFFF, (words >> 16).bitwise_and_(0xFFFF)]
        if self.stream % 2:
            halves.reverse()
        skip = self.start % 2
        return torch.stack(halves, 1).view(-1)[skip : skip + count]

    def paired16(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """As ``bits16``, but steps 2k and 2k + 1 draw mirrored bits: b and 65535 - b."""
        even = Draw(self.seed, self.step & ~1, self.param, self.stream, self.start)
        bits = even.bits16(count, device)
        return bits.bitwise_xor_(0xFFFF) if self.step % 2 else bits

    def dither(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Multiples of 2^-16 in [-1/2, 1/2), float32, shape [count]."""
        return self.bits16(count, device).to(torch.float32).sub_(32768).mul_(2.0**-16)


@dataclass(frozen=True)
class Counter:
    """The key of the random numbers of one parameter at one step.

    Args:
        seed: the optimizer's ``rounding_seed``, 0 to 2^63 - 1.
        step: the parameter's step count, from 1.
        param: the parameter's number, 0 to 2^63 - 1: its index in the optimizer, counted over all
            groups, or a hash of its name, see ``rounding_keys``.
        offset: the index of the first local element in the global tensor.
    """

    seed: int
    step: int
    param: int
    offset: int = 0

    def stream(self, stream: int) -> Draw:
        """The draw of one stream: 0 for the parameter write, 1 and up for the moments."""
        return Draw(self.seed, self.step, self.param, stream, self.offset)


def stochastic_round_bf16(x: Tensor, bits16: Tensor) -> Tensor:
    """Round float32 to bfloat16 up or down, with probabilities that make the mean exact.

    Values that bfloat16 represents, NaN and infinities are unchanged. A finite value becomes
    infinite only where rounding to nearest makes it infinite too.

    Args:
        x: float32, any shape.
        bits16: integers in [0, 65535], int32, the same shape.

    Returns:
        bfloat16 of the same shape.
    """
    raised = (x.view(torch.int32) + bits16).bitwise_and_(-65536).view(torch.float32)
    # NaN, and values from the largest finite one on, are rounded to nearest
    return torch.where(x.abs() < BF16_MAX, raised, x).to(torch.bfloat16)
