"""Counter-based random numbers: every stream draws from its own sequence, on any device, in any company.

Philox4x32-10 (Salmon et al., SC 2011): a keyed bijection of counters, so there is no generator state to keep; the draw
is a pure function of (stream key, step, draw, element).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Random bits that each type holds exactly, so that no draw is rounded up to 1."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words for each counter of four words and key of two. All int64 holding uint32 values,
    broadcast against one another."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _wide_multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _wide_multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _wide_multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The 64-bit product of uint32 values as (high, low) words; by 16-bit halves, as int64 would overflow its sign."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def stream_key(name: str, seed: int = 0) -> int:
    """The random key of a stream, a non-negative 63-bit integer: a digest of its name and the server's seed."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Uniform:
    """Draws ``[S, *shape]`` from [0, 1) for one engine step. Each call is a new, independent draw.

    ``keys [S]`` and ``steps [S]`` are int64: each stream's random key and the number of steps it has committed.
    """

    def __init__(self, keys: Tensor, steps: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self._keys, self._steps, self._dtype, self._draws = keys[:, None], steps[:, None], dtype, 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        block = torch.arange(-(-size // 4), device=self._keys.device)[None]
        words = philox(
            (block & _MASK, torch.full_like(block, self._draws), self._steps & _MASK, self._steps >> 32),
            (self._keys & _MASK, self._keys >> 32),
        )
        self._draws += 1
        mantissa = _BITS.get(self._dtype, 32)
        drawn = torch.stack(words, -1).flatten(1)[:, :size] >> (32 - mantissa)
        return (drawn.to(self._dtype) * 2.0**-mantissa).view(-1, *shape)
