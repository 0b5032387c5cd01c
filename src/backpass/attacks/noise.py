"""Random draws that belong to a sample, not to a batch: counter-based, from (seed, sample index, restart).

Entry j of a sample's draw is splitmix64(key + (j + 1) * gamma), where the key is a hash of the words that name
the draw. The arithmetic is that of wrapping 64-bit integers, hence the same on every device, and no generator
has a state to disturb. Source: Steele, Lea, Flood, Fast splittable pseudorandom number generators (OOPSLA 2014).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["make_key", "normal", "signs", "uniform"]


def _signed(word: int) -> int:
    """The integer in [-2**63, 2**63) equal to `word` modulo 2**64."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser, in place: z ^= z >>> s, z *= m, three rounds."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        # `>>` on int64 repeats the sign bit; the mask makes the shift logical.
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def make_key(seed: int, *words: Tensor | int, like: Tensor) -> Tensor:
    """Hashes a seed and words (sample index, restart, purpose) into one key per sample.

    Args:
        seed: any integer.
        *words: integers, or int64 tensors (N,), in a fixed order.
        like: (N,) int64, gives shape and device.

    Returns:
        (N,) int64.
    """
    key = _mix(torch.full_like(like, _signed(seed)).add_(_GAMMA))
    for word in words:
        key = _mix(key.add_(word if isinstance(word, Tensor) else _signed(word)).add_(_GAMMA))
    return key


def _bits(key: Tensor, count: int) -> Tensor:
    """(N, count) int64 of independent random bits, one stream per key (N,)."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=key.device).mul_(_GAMMA)
    return _mix(key[:, None] + counter)


def _unit(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Maps random bits to [0, 1): as many leading bits as the significand holds, so that 1 is never reached."""
    digits = 53 if dtype == torch.float64 else 24
    return (bits >> (64 - digits)).bitwise_and_((1 << digits) - 1).to(dtype).mul_(2.0**-digits)


def _shaped(draw: Tensor, like: Tensor) -> Tensor:
    """The draw (N, D) in the shape and the memory format of `like`."""
    draw = draw.view(like.shape)
    return draw if like.is_contiguous() else torch.empty_like(like).copy_(draw)


def uniform(key: Tensor, like: Tensor) -> Tensor:
    """U[0, 1), shaped like `like` (N, ...), one independent stream per key (N,)."""
    count = like[0].numel()
    return _shaped(_unit(_bits(key, count), like.dtype), like)


def normal(key: Tensor, like: Tensor) -> Tensor:
    """N(0, 1), shaped like `like` (N, ...): Box-Muller, sqrt(-2 ln(1 - u)) cos(2 pi v)."""
    count = like[0].numel()
    u, v = _unit(_bits(key, 2 * count), like.dtype).chunk(2, dim=1)
    return _shaped((-2.0 * torch.log1p(-u)).sqrt_() * torch.cos(2.0 * math.pi * v), like)


def signs(key: Tensor, like: Tensor) -> Tensor:
    """-1 or +1 with equal probability, shaped like `like` (N, ...)."""
    count = like[0].numel()
    return _shaped((_bits(key, count) < 0).to(like.dtype).mul_(-2.0).add_(1.0), like)
