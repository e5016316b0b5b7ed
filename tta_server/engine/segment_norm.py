"""Batch norm over the rows of each stream: statistics, forward and backward.

Batch-norm statistics are reduced first over each row's positions, then over each stream's rows. The first reduction
does not depend on the batch at all, and the second adds a stream's rows in their order, so a stream gets the same
numbers in any company (design law 1). The forward and backward passes are written out, two sweeps over the data each:

    y = a x + b,   a = gamma r,   b = beta - mu a,   r = (sigma^2 + eps)^(-1/2)
    mu = (1 - w) M + w m,   sigma^2 = (1 - w) V + w k v

with reference statistics ``M, V``, the stream's batch mean and biased variance ``m, v`` over ``n`` values, weight ``w``
and ``k = n / (n - 1)`` for unbiased mixtures, else 1. (Averages per row, see ``adapters.base.Norm``, have one more term
in ``sigma^2``; they only answer and have no backward pass.) With ``G = sum g`` and ``X = sum g (x - mu)`` per stream
and channel, where ``g`` is the gradient of the loss with respect to ``y``,

    d beta = G,   d gamma = r X,   d x = a g - (w a / n) G - (w a / n) k r (d gamma) (x - m).

Where ``m`` is the median and ``v`` the mean square of ``x - m`` (``k = 1``), ``m`` moves with the value ``x_j`` that it
is, and ``v`` with ``m`` unless that is the mean ``m'``, too. In the place of the second term, which is shared by all
values, there is one for ``x_j``,

    d x_j = ... - w a (G + r (d gamma) (m - m')),

shared by those that are equal to it. This is the derivative wherever there is one; in between, where values tie, one of
the subgradients, which does not depend on the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapters.base import BATCH_NORM, Norm, Segments

_BLOCK = 2**18
"""Values that are worked on together, so that one operation finds in the cache what the last one left."""


Rest = Callable[[Tensor, slice, Segments], Tensor]
"""Normalises some rows, of the streams of a slice."""
_LARGE = 2**18
"""Values of a stream in a layer from which on torch's own kernel is faster."""


def by_kernel(x: Tensor, gamma: Tensor, beta: Tensor, segments: Segments, eps: float, rest: Rest) -> Tensor:
    """Batch norm of ``x [N, channels, ...]`` where each stream is normalised by its batch alone (``BATCH_NORM``): a
    stream with many values in a call of torch's own kernel, by itself, neighbours with few by ``rest``.

    Which way a stream goes depends on its own size only, so its numbers do not depend on its company.
    """
    each = x[0].numel()
    parts, row, stream = list[Tensor](), 0, 0
    for is_large, sizes in groupby(segments.sizes, key=lambda size: size * each >= _LARGE):
        for some in [[size] for size in sizes] if is_large else [list(sizes)]:
            rows, streams = slice(row, row + sum(some)), slice(stream, stream + len(some))
            own = x if len(some) == segments.streams else x[rows]
            if is_large:
                scale, shift = (one[0] if len(one) == 1 else one[stream] for one in (gamma, beta))
                y = F.batch_norm(own, None, None, scale, shift, True, 0.0, eps)
            else:
                y = rest(own, streams, segments if own is x else Segments(some, x.device))
            parts.append(y)
            row, stream = rows.stop, streams.stop
    if len(parts) == 1:
        return parts[0]
    # Side by side in memory as images are here; torch.cat would choose by the parts' sizes.
    return torch.cat([part.movedim(1, -1) for part in parts if len(part)]).movedim(-1, 1)


class SegmentBatchNorm(torch.autograd.Function):
    """The module's formulas. ``gamma, beta, mean, var``: ``[S, channels]`` or ``[1, channels]``, the latter two without
    gradient. Returns ``y [N, channels, L]`` and the statistics used, ``[S, channels]``."""

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
        rows = _flat(x)
        positions = rows.shape[2]
        mean, var = reference_mean, reference_var
        batch_shift = weight = None
        if norm.weight == 0:
            shift = -per_row(mean, segments)
        else:
            moments = _about_median if norm.median else _moments
            rows, batch_mean, batch_var, batch_shift = moments(rows, segments)
            counts = segments.rows_per_stream(x.dtype)
            if norm in _BATCH_ALONE and min(segments.sizes) * positions > 1:
                mean, var, shift = batch_mean, batch_var, batch_shift
            elif norm.per_row:
                weight = 1 - (1 - norm.weight) ** counts
                between = weight * (1 - weight) * (batch_mean - mean).square()
                mean, var = torch.lerp(mean, batch_mean, weight), torch.lerp(var, batch_var, weight) + between
                shift = batch_shift + segments.spread(batch_mean - mean)
            else:
                values = counts * positions
                # One value per channel has no variance: such streams keep the reference.
                weight = (values > 1).to(x.dtype) * (counts / (counts + norm.prior) if norm.prior else norm.weight)
                if _unbiased(norm):
                    batch_var = batch_var * (values / (values - 1).clamp_min(1))
                mean, var = torch.lerp(mean, batch_mean, weight), torch.lerp(var, batch_var, weight)
                shift = batch_shift + segments.spread(batch_mean - mean)
        r = (var + eps).rsqrt_()
        a = gamma * r
        row_a = per_row(a, segments)
        row_b = torch.addcmul(per_row(beta, segments), row_a, shift)
        y = torch.addcmul(row_b.unsqueeze(2), rows, row_a.unsqueeze(2))
        # Now x - mu = rows + shift, and x - m = rows + batch_shift.
        ctx.save_for_backward(rows, shift, batch_shift, r, a, row_a, weight)
        ctx.segments, ctx.norm = segments, norm
        ctx.shared = len(gamma) < segments.streams, len(beta) < segments.streams
        ctx.mark_non_differentiable(mean, var)
        ctx.shape = x.shape
        # Not viewed as x here: what a Function returns as a view cannot be changed in place, as many networks do next.
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, shift, batch_shift, r, a, row_a, weight = ctx.saved_tensors
        segments = ctx.segments
        assert not ctx.norm.per_row, "statistics per row have no backward pass"
        g = g_y
        row_g, row_gx = (g.new_empty(g.shape[:2]) for _ in range(2))
        for block in _blocks(g):
            torch.sum(g[block], 2, out=row_g[block])
            torch.sum(g[block] * rows[block], 2, out=row_gx[block])
        g_beta = segments.sum(row_g)
        g_gamma = segments.sum(row_gx.addcmul_(row_g, shift)).mul_(r)
        g_x = None
        if ctx.needs_input_grad[0]:
            row_a = row_a.unsqueeze(2)
            if batch_shift is None:
                g_x = g * row_a
            else:
                values = segments.rows_per_stream(g.dtype).clamp_min(1) * rows.shape[2]
                through = a / -values if weight is None else a / -values * weight
                slope = through * r * g_gamma
                if _unbiased(ctx.norm):
                    slope *= values / (values - 1).clamp_min(1)
                row_slope = segments.spread(slope)
                offset = torch.zeros_like(row_slope)
                if not ctx.norm.median:
                    offset = torch.addcmul(segments.spread(through * g_beta), row_slope, batch_shift)
                g_x = torch.empty_like(rows)
                for block in _blocks(g):
                    torch.addcmul(
                        offset[block].unsqueeze(2), rows[block], row_slope[block].unsqueeze(2), out=g_x[block]
                    )
                    g_x[block].addcmul_(g[block], row_a if len(row_a) == 1 else row_a[block])
                if ctx.norm.median:
                    skew = segments.mean(rows.mean(2))
                    chosen = (rows == 0).to(g.dtype)
                    pull = values * torch.addcmul(through * g_beta, slope, skew, value=-1)
                    ties = segments.sum(chosen.sum(2)).clamp_min_(1)
                    g_x.addcmul_(chosen, segments.spread(pull.div_(ties)).unsqueeze(2))
            g_x = g_x.view(ctx.shape)
        if ctx.shared[0]:
            g_gamma = g_gamma.sum(0, keepdim=True)
        if ctx.shared[1]:
            g_beta = g_beta.sum(0, keepdim=True)
        return g_x, g_gamma, g_beta, None, None, None, None, None


_BATCH_ALONE = (BATCH_NORM, replace(BATCH_NORM, median=True))


def _unbiased(norm: Norm) -> bool:
    return norm != BATCH_NORM and not norm.biased and not norm.median


def batch_statistics(x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each stream's values by channel -> ``[S, channels]`` each, without gradient."""
    with torch.no_grad():
        _, mean, var, _ = _moments(_flat(x.float() if x.dtype.itemsize < 4 else x), segments)
        return mean, var


def per_row(streams: Tensor, segments: Segments) -> Tensor:
    """``[S, channels]`` -> ``[N, channels]``; what is shared by all streams, ``[1, channels]``, stays as it is."""
    return streams if len(streams) == 1 else segments.spread(streams)


class _Moments(NamedTuple):
    """``rows [N, channels, L]``: ``x``, or all of it shifted by stream. ``mean`` (or median) and biased ``var`` per
    stream, ``[S, channels]``; ``rows + shift`` is ``x - mean`` of the row's stream, ``shift [N, channels]``.
    """

    rows: Tensor
    mean: Tensor
    var: Tensor
    shift: Tensor


def _moments(rows: Tensor, segments: Segments) -> _Moments:
    """Of ``rows [N, channels, L]``: row means and centred squares first, then combined over each stream's rows.

    No difference of large squares anywhere, so float32 suffices.
    """
    positions = rows.shape[2]
    row_mean, squares = (rows.new_empty(rows.shape[:2]) for _ in range(2))
    for block in _blocks(rows):
        torch.mean(rows[block], 2, out=row_mean[block])
        centred = rows[block] - row_mean[block].unsqueeze(2)
        # Several times as fast as torch's norm or variance, where channels are last.
        torch.sum(centred.square_(), 2, out=squares[block])
    mean = segments.mean(row_mean)
    row_gap = row_mean - segments.spread(mean)
    var = segments.mean(squares.addcmul_(row_gap, row_gap, value=positions)).div_(positions)
    return _Moments(rows, mean, var, -segments.spread(mean))


def _about_median(rows: Tensor, segments: Segments) -> _Moments:
    """The same about each stream's median, by which its rows are shifted: where it is, they are 0."""
    positions = rows.shape[2]
    median = torch.stack([_lower_median(part) for part in rows.split(segments.sizes)])
    centre = segments.spread(median)
    centred = rows - centre.unsqueeze(2)
    var = segments.mean(centred.square().sum(2)).div_(positions)
    return _Moments(centred, median, var, torch.zeros_like(centre))


def _lower_median(rows: Tensor) -> Tensor:
    """The ``(n + 1) // 2``-th smallest of each channel's ``n = N L`` values ``rows [N, channels, L]``; 0 without rows.

    On a CPU by numpy, whose selection takes about a tenth of the time of torch's; both are exact.
    """
    if not len(rows):
        return rows.new_zeros(rows.shape[1])
    values = rows.transpose(0, 1).flatten(1).contiguous()
    if not values.is_cpu:
        return values.median(1).values
    middle = (values.shape[1] - 1) // 2
    wide = values.to(torch.promote_types(values.dtype, torch.float32))  # numpy knows no bfloat16
    return torch.from_numpy(np.partition(wide.numpy(), middle, axis=1)[:, middle]).to(values)


def _blocks(rows: Tensor) -> list[slice]:
    """Parts of ``rows [N, channels, L]``, whole rows each; all of them at once on a GPU, which has no use for less."""
    size = len(rows) if rows.is_cuda else max(1, _BLOCK // max(1, rows[0].numel()))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _flat(x: Tensor) -> Tensor:
    """``[N, channels]`` or ``[N, channels, ...]`` as ``[N, channels, L]``."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
