"""The segment batch norm in four Triton kernels, for CUDA. Formulas: ``segment_norm.py``, the eager version and test
oracle.

Each stream's rows are split into *chunks* that a program can take on. Forward, one kernel leaves each chunk's sum and
centred squares, and a second one adds up its own stream's, normalises the chunk, and leaves the stream's statistics.
Backward is the same: sums of ``g`` and ``g (x - mu)``, then ``d x`` by chunk and the other two by stream. ``x`` is read
three times and ``y`` written once; no atomics. What is added up is float32 for 16-bit inputs, too (and float64 for
float64).

How large chunks and tiles are depends on the layer's channels, positions and order in memory only, and they are counted
from a stream's first row. So a stream's sums have one order, and its numbers are the same, bit for bit, in any company.

Averages per row and medians (``Norm.per_row``, ``Norm.median``) stay with the eager version.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapters.base import BATCH_NORM, Norm, Segments
from tta_server.engine.segment_norm import SegmentBatchNorm

log = logging.getLogger(__name__)

_TILE = 1024
"""Values in a tile."""
_CHUNK = 4096
"""Values that a program takes on, as far as whole rows allow."""
_MOST_ROWS = 64
"""In a chunk."""


def available(x: Tensor, norm: Norm = BATCH_NORM) -> bool:
    """Whether :class:`TritonBatchNorm` can stand in for :class:`SegmentBatchNorm` here. The first time on a device it
    compiles, and is tried."""
    return x.is_cuda and _has_kernels(norm) and _works(x.device)


def _has_kernels(norm: Norm) -> bool:
    return norm.weight > 0 and not norm.per_row and not norm.median


@cache
def _works(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    try:
        x = torch.linspace(-1, 2, 60, device=device).sin().view(5, 3, 4)
        source = [torch.full((1, 3), value, device=device) for value in (2.0, 1.0, 0.0, 1.0)]
        with torch.no_grad():
            y, expected = (
                kind.apply(x, *source, Segments([2, 3], device), BATCH_NORM, 1e-5)[0]  # type: ignore[no-untyped-call]  # torch leaves it untyped
                for kind in (TritonBatchNorm, SegmentBatchNorm)
            )
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    except Exception as error:  # no C compiler, an old device, ...
        log.warning("batch norms run without their Triton kernels: %s", error)
        return False
    return True


class TritonBatchNorm(torch.autograd.Function):
    """Stands in for :class:`SegmentBatchNorm`. The statistics returned have the reference's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        reference_mean: Tensor,
        reference_var: Tensor,
        segments: Segments,
        norm: Norm,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert _has_kernels(norm), norm
        rows = _dense(x.flatten(2) if x.dim() > 2 else x.unsqueeze(2))
        plan = _Plan.of(rows, segments)
        shape = segments.streams, plan.channels
        kernels = _kernels()
        y, partial = torch.empty_like(rows), plan.new_partial(rows)
        kept = torch.empty(segments.streams, 3, plan.channels, dtype=_working(rows), device=x.device)
        mean, var = reference_mean.new_empty(shape), reference_var.new_empty(shape)
        given = [
            one if one.stride(1) == 1 else one.contiguous() for one in (gamma, beta, reference_mean, reference_var)
        ]
        with torch.cuda.device_of(rows):
            kernels.moments[plan.grid](rows, plan.chunks, partial, **plan.arguments)
            kernels.normalise[plan.grid](
                rows, y, *given, *map(_step, given), plan.chunks, partial, kept, mean, var,
                plan.most, float(norm.weight), float(norm.prior), eps, **plan.arguments, UNBIASED=_unbiased(norm),
            )  # fmt: skip
        ctx.save_for_backward(rows, kept, given[0])
        ctx.plan, ctx.norm, ctx.shape = plan, norm, x.shape
        ctx.affine = (len(gamma), gamma.dtype), (len(beta), beta.dtype)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, kept, gamma = ctx.saved_tensors
        plan, norm, wanted = ctx.plan, ctx.norm, ctx.needs_input_grad[0]
        g = _dense(g_y)
        if g.stride() != rows.stride():
            g = torch.empty_like(rows).copy_(g)
        kernels = _kernels()
        partial, g_x = plan.new_partial(rows), torch.empty_like(rows) if wanted else rows
        g_gamma, g_beta = (kept.new_empty(len(kept), plan.channels) for _ in range(2))
        with torch.cuda.device_of(rows):
            kernels.slopes[plan.grid](rows, g, plan.chunks, kept, partial, **plan.arguments)
            kernels.differentiate[plan.grid](
                rows, g, g_x, g_gamma, g_beta, gamma, _step(gamma), plan.chunks, partial, kept,
                float(norm.weight), float(norm.prior), **plan.arguments, UNBIASED=_unbiased(norm), WRITE=wanted,
            )  # fmt: skip
        own_gamma, own_beta = (
            (one if count == len(kept) else one.sum(0, keepdim=True)).to(dtype)
            for one, (count, dtype) in zip((g_gamma, g_beta), ctx.affine, strict=True)
        )
        return g_x.view(ctx.shape) if wanted else None, own_gamma, own_beta, None, None, None, None, None


@dataclass(frozen=True)
class _Plan:
    """How a layer's rows are split over programs."""

    chunks: Tensor
    """``[P, 6]``, see the kernels."""
    channels: int
    most: int
    """Rows in a chunk."""
    grid: tuple[int, int]
    arguments: Mapping[str, Any]
    """What all kernels are told."""

    @staticmethod
    def of(rows: Tensor, segments: Segments) -> _Plan:
        """For dense ``rows [N, channels, L]``."""
        _, channels, positions = rows.shape
        last = positions == 1 or not rows.is_contiguous()
        wide = min(32, _power_of_two(channels)) if last else 1
        most = max(1, min(_MOST_ROWS, _power_of_two(_CHUNK // (wide * positions) + 1) // 2))
        long = min(_TILE // wide, _power_of_two(most * positions))
        chunks = _chunks(tuple(segments.sizes), most, rows.device)
        tl = _kernels().tl
        working = tl.float64 if rows.dtype == torch.float64 else tl.float32
        arguments = {"C": channels, "L": positions, "LAST": last, "BL": long, "BC": wide, "ACC": working}
        return _Plan(chunks, channels, most, (len(chunks), -(-channels // wide)), arguments)

    def new_partial(self, rows: Tensor) -> Tensor:
        """Room for two sums of each chunk."""
        return torch.empty(len(self.chunks), 2, self.channels, dtype=_working(rows), device=rows.device)


@lru_cache(256)
def _chunks(sizes: tuple[int, ...], most: int, device: torch.device) -> Tensor:
    """The chunks of at most so many rows, ``[P, 6]``. A stream without rows has an empty one, which leaves its
    statistics and gradients."""
    rows = np.array(sizes)
    counts = np.maximum(-(-rows // most), 1)
    stream = np.repeat(np.arange(len(rows)), counts)
    before = (np.cumsum(counts) - counts)[stream]
    past = most * (np.arange(len(stream)) - before)
    first = (np.cumsum(rows) - rows)[stream] + past
    own = np.minimum(rows[stream] - past, most)
    table = np.stack([first, own, stream, before, counts[stream], rows[stream]], 1).astype(np.int32)
    chunks = torch.from_numpy(table)
    return chunks.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else chunks


@cache
def _kernels() -> Any:
    from tta_server.engine import triton_kernels

    return triton_kernels


def _dense(rows: Tensor) -> Tensor:
    """``rows [N, channels, L]`` without gaps, channels or positions side by side, and from an address on for which
    kernels are compiled: another one would be another kernel, and might add up in another order."""
    dense = rows if rows.is_contiguous() or rows.transpose(1, 2).is_contiguous() else rows.contiguous()
    return dense.clone() if dense.data_ptr() % 16 else dense


def _step(streams: Tensor) -> int:
    """From one stream's values to the next one's; 0 where they share them."""
    return 0 if len(streams) == 1 else streams.stride(0)


def _unbiased(norm: Norm) -> bool:
    return norm != BATCH_NORM and not norm.biased


def _working(rows: Tensor) -> torch.dtype:
    """What sums are of."""
    return torch.promote_types(rows.dtype, torch.float32)


def _power_of_two(number: int) -> int:
    """The least one that is not below."""
    return 1 << max(0, number - 1).bit_length()
