"""Counter-based random numbers: every stream draws from its own sequence, on any device, in any company.

Philox4x32-10 (Salmon et al., SC 2011): a keyed bijection of counters, so there is no generator state to keep; the draw
is a pure function of (stream key, step, draw, element).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from adapters.base import Segments

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Random bits that each type holds exactly, so that no draw is rounded up to 1."""
_BULK = 2**32 - 1
"""Counter of the seeds for torch's generators; :meth:`Random.uniform` counts from 0 and does not get here."""


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


def _key(high: Tensor, low: Tensor) -> Tensor:
    """Two random words as a non-negative 63-bit integer."""
    return (high >> 1 << 32) | low


class Random:
    """Random numbers of the streams of one engine step. Each call is a new, independent draw.

    ``keys [S]`` and ``steps [S]`` are int64: each stream's random key and the number of steps it has committed. What a
    stream draws depends on these two, on the names on the way (:meth:`named`), and on how many draws came before from
    the same object; so draws that only some streams make need a name of their own.

    Few numbers come from Philox and are the same on every device (:meth:`uniform`); many come from torch's own
    generators, seeded by it, stream by stream, and are the same on devices of one kind.
    """

    def __init__(self, keys: Tensor, steps: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self._keys, self._steps, self._dtype, self._draws = keys, steps, dtype, 0

    def named(self, name: str) -> Random:
        """Draws for one purpose, independent of all others; the same at every call."""
        tag = stream_key(name)
        high, low, _, _ = self._philox(torch.full_like(self._keys, tag & _MASK), tag >> 32)
        return Random(_key(high, low).squeeze(1), self._steps, self._dtype)

    def among(self, streams: list[int]) -> Random:
        """Draws of these streams alone, as they are in any company."""
        index = torch.tensor(streams, device=self._keys.device)
        return Random(self._keys[index], self._steps[index], self._dtype)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """``[S, *shape]`` from [0, 1)."""
        size = math.prod(shape)
        block = torch.arange(-(-size // 4), device=self._keys.device)[None]
        words = self._philox(block, self._draws)
        self._draws += 1
        mantissa = _BITS.get(self._dtype, 32)
        drawn = torch.stack(words, -1).flatten(1)[:, :size] >> (32 - mantissa)
        return (drawn.to(self._dtype) * 2.0**-mantissa).view(len(self._keys), *shape)

    def uniform_rows(self, segments: Segments, shape: tuple[int, ...]) -> Tensor:
        """``[N, *shape]`` from [0, 1) for the rows of ``segments``, which are of the same streams."""
        return self._fill(segments.sizes, shape, torch.rand, self._dtype)

    def normal_rows(self, segments: Segments, shape: tuple[int, ...]) -> Tensor:
        """``[N, *shape]``, standard normal, for the rows of ``segments``, which are of the same streams."""
        return self._fill(segments.sizes, shape, torch.randn, self._dtype)

    def coins(self, probability: float, shape: tuple[int, ...]) -> Tensor:
        """``[S, *shape]`` of bool, each true with this probability. For many."""
        return self._fill([1] * len(self._keys), shape, torch.rand, torch.float32) < probability

    def _fill(
        self, sizes: list[int], shape: tuple[int, ...], draw: Callable[..., Tensor], dtype: torch.dtype
    ) -> Tensor:
        high, low, _, _ = self._philox(torch.full_like(self._keys, _BULK), self._draws)
        self._draws += 1
        seeds = _key(high, low).squeeze(1).tolist()
        generator = torch.Generator(self._keys.device)
        return torch.cat(
            [
                draw(
                    (size, *shape),
                    generator=generator.manual_seed(seed),
                    dtype=dtype,
                    device=self._keys.device,
                )
                for seed, size in zip(seeds, sizes, strict=True)
            ]
        )

    def _philox(self, first: Tensor, second: int) -> tuple[Tensor, ...]:
        """Random words of each stream's key and step for the counters ``first`` (``[S]``, ``[S, n]`` or ``[1, n]``) and
        ``second``: ``[S, n]``."""
        first = first[:, None] if first.dim() == 1 else first
        keys, steps = self._keys[:, None], self._steps[:, None]
        return philox(
            (first & _MASK, torch.full_like(first, second & _MASK), steps & _MASK, steps >> 32),
            (keys & _MASK, keys >> 32),
        )
