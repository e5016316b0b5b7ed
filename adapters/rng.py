"""Counter-based random numbers: every stream draws from its own sequence, on any device, in any company.

Philox4x32-10 (Salmon et al., SC 2011): a keyed bijection of counters, so there is no generator state to keep; the draw
is a pure function of (stream key, step, draw, element). It runs in numpy on the host: some hundred operations on a few
numbers, which would each be a kernel on a device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from adapters.base import Segments

Words = NDArray[np.uint64]
"""Of 32 bits each."""

_MULTIPLIERS = np.array((0xD2511F53, 0xCD9E8D57), np.uint64)
_WEYL = np.array((0x9E3779B9, 0xBB67AE85), np.uint64)
_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Random bits that each type holds exactly, so that no draw is rounded up to 1."""
_BULK = 2**32 - 1
"""Counter of the seeds for torch's generators; :meth:`Random.uniform` counts from 0 and does not get here."""


def philox(counter: Words, key: Words) -> Words:
    """Four random 32-bit words for each counter of four and key of two: ``[4, ...]`` of ``counter [4, ...]`` and
    ``key [2, ...]``, broadcast against one another."""
    ahead = (slice(None), *[None] * (counter.ndim - 1))
    even, odd = counter[0::2], counter[1::2]
    for _ in range(10):
        product = even * _MULTIPLIERS[ahead]
        even, odd = (product >> _HALF)[::-1] ^ odd ^ key, (product & _MASK)[::-1]
        key = (key + _WEYL[ahead]) & _MASK
    return np.stack((even[0], odd[0], even[1], odd[1]))


def stream_key(name: str, seed: int = 0) -> int:
    """The random key of a stream, a non-negative 63-bit integer: a digest of its name and the server's seed."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Random:
    """Random numbers of the streams of one engine step. Each call is a new, independent draw.

    ``keys [S]`` and ``steps [S]`` are int64: each stream's random key and the number of steps it has committed. What a
    stream draws depends on these two, on the names on the way (:meth:`named`), and on how many draws came before from
    the same object; so draws that only some streams make need a name of their own.

    Few numbers come from Philox and are the same on every device (:meth:`uniform`); many come from torch's own
    generators, seeded by it, stream by stream, and are the same on devices of one kind.
    """

    def __init__(
        self, keys: Tensor, steps: Tensor, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        """Draws are of this ``dtype`` and on this ``device``, without one on that of the keys."""
        self._keys, self._steps, self._dtype, self._draws = keys.cpu(), steps.cpu(), dtype, 0
        self._device = device or keys.device

    def named(self, name: str) -> Random:
        """Draws for one purpose, independent of all others; the same at every call."""
        return self.named_each([name])

    def named_each(self, names: list[str]) -> Random:
        """Draws for several purposes at once, as if there were a stream for each: ``[S * K]`` of them, the ``K`` of a
        stream side by side."""
        tags = np.array([stream_key(name) for name in names], np.uint64)
        keys = self._new_keys(tags & _MASK, tags >> _HALF)
        return Random(keys.flatten(), self._steps.repeat_interleave(len(names)), self._dtype, self._device)

    def among(self, streams: list[int]) -> Random:
        """Draws of these streams alone, as they are in any company."""
        return Random(self._keys[streams], self._steps[streams], self._dtype, self._device)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """``[S, *shape]`` from [0, 1)."""
        size = math.prod(shape)
        words = self._philox(np.arange(-(-size // 4), dtype=np.uint64), self._draws)
        self._draws += 1
        mantissa = _BITS.get(self._dtype, 32)
        drawn = np.moveaxis(words, 0, -1).reshape(len(self._keys), -1)[:, :size] >> np.uint64(32 - mantissa)
        values = torch.from_numpy(drawn.view(np.int64)).to(self._device, self._dtype) * 2.0**-mantissa
        return values.view(len(self._keys), *shape)

    def uniform_rows(self, segments: Segments, shape: tuple[int, ...]) -> Tensor:
        """``[N, *shape]`` from [0, 1) for the rows of ``segments``, which are of the same streams."""
        return self._fill(segments.sizes, shape, Tensor.uniform_, self._dtype)

    def normal_rows(self, segments: Segments, shape: tuple[int, ...]) -> Tensor:
        """``[N, *shape]``, standard normal, for the rows of ``segments``, which are of the same streams."""
        return self._fill(segments.sizes, shape, Tensor.normal_, self._dtype)

    def coins(self, probability: float, shape: tuple[int, ...]) -> Tensor:
        """``[S, *shape]`` of bool, each true with this probability. For many."""
        return self._fill([1] * len(self._keys), shape, Tensor.uniform_, torch.float32) < probability

    def _fill(
        self, sizes: list[int], shape: tuple[int, ...], draw: Callable[..., Tensor], dtype: torch.dtype
    ) -> Tensor:
        seeds = self._new_keys(_BULK, self._draws).flatten().tolist()
        self._draws += 1
        generator = torch.Generator(self._device)
        filled = torch.empty((sum(sizes), *shape), dtype=dtype, device=self._device)
        for seed, rows in zip(seeds, filled.split(sizes), strict=True):
            draw(rows, generator=generator.manual_seed(seed))
        return filled

    def _new_keys(self, first: Words | int, second: Words | int) -> Tensor:
        """Non-negative 63-bit integers ``[S, n]`` for the counters ``first`` and ``second``."""
        high, low, _, _ = self._philox(first, second)
        return torch.from_numpy(((high >> np.uint64(1) << _HALF) | low).view(np.int64))

    def _philox(self, first: Words | int, second: Words | int) -> Words:
        """Random words ``[4, S, n]`` of each stream's key and step for the counters ``first`` and ``second``, ``[n]``
        each or one number."""
        keys, steps = (one.numpy().view(np.uint64)[:, None] for one in (self._keys, self._steps))
        counter = np.empty((4, len(keys), np.size(first)), np.uint64)
        counter[0], counter[1], counter[2], counter[3] = first, second, steps & _MASK, steps >> _HALF
        return philox(counter, np.stack((keys & _MASK, keys >> _HALF)))
