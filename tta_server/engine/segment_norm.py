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

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapters.base import BATCH_NORM, Norm, Segments

_ALONE = 2**16
"""Values of a stream from which on it has a call of its own: two copies cost more than that."""
_REGISTER = 64
"""Bytes of the widest vector register. What does not fill one is rounded otherwise."""


def own_batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    reference_mean: Tensor,
    reference_var: Tensor,
    segments: Segments,
    eps: float,
) -> Tensor:
    """What :class:`SegmentBatchNorm` computes where each stream is normalised by its batch alone (``BATCH_NORM``), by
    torch's own kernels for the CPU: ``y`` of the shape of ``x [N, channels, ...]``.

    Streams side by side of equally many rows are folded into channels for one call. These kernels treat each channel by
    itself, and always get ``[values, channels]``, so a stream's numbers are the same folded, alone and in any company.
    Small streams whose channels do not fill whole registers, and those with one value per channel, which has no
    variance, are left to the other.
    """
    channels, values = x.shape[1], x[0, 0].numel() if len(x) else 1
    folds = channels * x.element_size() % _REGISTER == 0
    parts, row, stream = list[Tensor](), 0, 0
    for streams, size in segments.runs:
        is_large = size * values * channels >= _ALONE
        step = 1 if is_large else streams
        for first in range(stream, stream + streams, step) if size else ():
            own = slice(first, first + step)
            part = x[row : row + step * size] if len(segments.sizes) > step else x
            scale, shift, mean, var = (
                one if len(one) == 1 else one[own] for one in (gamma, beta, reference_mean, reference_var)
            )
            if size * values > 1 and (is_large or folds):
                parts.append(_folded_batch_norm(part, scale, shift, step, eps))
            else:
                few = Segments([size] * step, x.device)
                y, _, _ = SegmentBatchNorm.apply(part, scale, shift, mean, var, few, BATCH_NORM, eps)  # type: ignore[no-untyped-call]  # torch leaves it untyped
                parts.append(y.view_as(part).movedim(1, -1).contiguous())
            row += step * size
        stream += streams
    # In this order, as torch.cat would choose another one by the parts' sizes.
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).movedim(-1, 1)


def _folded_batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, streams: int, eps: float) -> Tensor:
    """Batch norm of ``x [streams * n, channels, ...]`` over each stream's ``n`` rows, with channels last."""
    channels = x.shape[1]
    last = x.movedim(1, -1)  # of images in channels_last the order in memory
    folded = last.reshape(streams, -1, channels).transpose(0, 1).reshape(-1, streams * channels)
    gamma, beta = (one.expand(streams, channels).reshape(-1) for one in (gamma, beta))
    y = F.batch_norm(folded, None, None, gamma, beta, True, 0.0, eps)
    return y.view(-1, streams, channels).transpose(0, 1).reshape(last.shape).contiguous()


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
            rows, row_centre, batch_mean, batch_var, batch_shift = moments(rows, segments)
            counts = segments.rows_per_stream(x.dtype)
            if norm in _BATCH_ALONE and min(segments.sizes) * positions > 1:
                mean, var, shift = batch_mean, batch_var, batch_shift
            elif norm.per_row:
                weight = 1 - (1 - norm.weight) ** counts
                between = weight * (1 - weight) * (batch_mean - mean).square()
                mean, var = torch.lerp(mean, batch_mean, weight), torch.lerp(var, batch_var, weight) + between
                shift = row_centre - segments.spread(mean)
            else:
                values = counts * positions
                # One value per channel has no variance: such streams keep the reference.
                weight = (values > 1).to(x.dtype) * (counts / (counts + norm.prior) if norm.prior else norm.weight)
                if _unbiased(norm):
                    batch_var = batch_var * (values / (values - 1).clamp_min(1))
                mean, var = torch.lerp(mean, batch_mean, weight), torch.lerp(var, batch_var, weight)
                shift = row_centre - segments.spread(mean)
        r = (var + eps).rsqrt_()
        a = gamma * r
        row_a = per_row(a, segments)
        y = rows * row_a.unsqueeze(2)
        y += torch.addcmul(per_row(beta, segments), row_a, shift).unsqueeze(2)
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
        row_g = g.sum(2)
        g_beta = segments.sum(row_g)
        g_gamma = segments.sum((g * rows).sum(2).addcmul_(row_g, shift)).mul_(r)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = g * row_a.unsqueeze(2)
            if batch_shift is not None:
                values = segments.rows_per_stream(g.dtype).clamp_min(1) * rows.shape[2]
                through = a / -values if weight is None else a / -values * weight
                slope = through * r * g_gamma
                if _unbiased(ctx.norm):
                    slope *= values / (values - 1).clamp_min(1)
                row_slope = segments.spread(slope)
                g_x.addcmul_(rows, row_slope.unsqueeze(2))
                if ctx.norm.median:
                    skew = segments.mean(rows.mean(2))
                    chosen = (rows == 0).to(g.dtype)
                    pull = values * torch.addcmul(through * g_beta, slope, skew, value=-1)
                    ties = segments.sum(chosen.sum(2)).clamp_min_(1)
                    g_x.addcmul_(chosen, segments.spread(pull.div_(ties)).unsqueeze(2))
                else:
                    offset = torch.addcmul(segments.spread(through * g_beta), row_slope, batch_shift)
                    g_x.add_(offset.unsqueeze(2))
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
        _, _, mean, var, _ = _moments(_flat(x.float() if x.dtype.itemsize < 4 else x), segments)
        return mean, var


def per_row(streams: Tensor, segments: Segments) -> Tensor:
    """``[S, channels]`` -> ``[N, channels]``; what is shared by all streams, ``[1, channels]``, stays as it is."""
    return streams if len(streams) == 1 else segments.spread(streams)


class _Moments(NamedTuple):
    """``x = centred + row_centre``, ``centred [N, channels, L]`` and ``row_centre [N, channels]``; ``mean`` (or median)
    and biased ``var`` per stream, ``[S, channels]``; ``shift = row_centre - mean`` of the row's stream.
    """

    centred: Tensor
    row_centre: Tensor
    mean: Tensor
    var: Tensor
    shift: Tensor


def _moments(rows: Tensor, segments: Segments) -> _Moments:
    """Of ``rows [N, channels, L]``: row means and centred squares first, then combined over each stream's rows.

    No difference of large squares anywhere, so float32 suffices.
    """
    positions = rows.shape[2]
    row_mean = rows.mean(2)
    centred = rows - row_mean.unsqueeze(2)
    squares = torch.linalg.vector_norm(centred, dim=2).square_()
    mean = segments.mean(row_mean)
    shift = row_mean - segments.spread(mean)
    var = segments.mean(squares.addcmul_(shift, shift, value=positions)).div_(positions)
    return _Moments(centred, row_mean, mean, var, shift)


def _about_median(rows: Tensor, segments: Segments) -> _Moments:
    """The same about each stream's median, which centres all of its rows."""
    positions = rows.shape[2]
    median = torch.stack([_lower_median(part) for part in rows.split(segments.sizes)])
    centre = segments.spread(median)
    centred = rows - centre.unsqueeze(2)
    squares = torch.linalg.vector_norm(centred, dim=2).square_()
    return _Moments(centred, centre, median, segments.mean(squares).div_(positions), torch.zeros_like(centre))


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


def _flat(x: Tensor) -> Tensor:
    """``[N, channels]`` or ``[N, channels, ...]`` as ``[N, channels, L]``."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
