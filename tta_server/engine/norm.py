"""Norm layers that normalise every stream by itself.

They stand in for the model's own, under the same parameter names, and read what the current pass needs from the one
:class:`Pass` of the model: whose rows these are, the streams' own scales and shifts, and which statistics to use.

Batch-norm statistics are reduced first over each row's positions, then over each stream's rows. The first reduction
does not depend on the batch at all, and the second adds a stream's rows in their order, so a stream gets the same
numbers in any company (design law 1). The forward and backward passes are written out, two sweeps over the data each:

    y = a x + b,   a = gamma r,   b = beta - mu a,   r = (sigma^2 + eps)^(-1/2)
    mu = (1 - w) M + w m,   sigma^2 = (1 - w) V + w k v

with reference statistics ``M, V``, the stream's batch mean and biased variance ``m, v`` over ``n`` values, weight ``w``
and ``k = n / (n - 1)`` for mixtures, 1 for a pure batch. With ``G = sum g`` and ``X = sum g (x - mu)`` per stream and
channel, where ``g`` is the gradient of the loss with respect to ``y``,

    d beta = G,   d gamma = r X,   d x = a g - (w a / n) G - (w a / n) k r (d gamma) (x - m).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adapters.base import BATCH_NORM, SOURCE_NORM, Norm, Segments, Tensors


@dataclass
class Pass:
    """What the norm layers of one model read and leave during one forward pass. Used by one thread only."""

    segments: Segments
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    norm: Norm = SOURCE_NORM
    observe: bool = False
    """Measure each batch-norm layer's distance to the source while normalising as ``norm`` says."""
    statistics: Tensors = field(default_factory=dict)
    """Left by running batch norms: the streams' new means and variances, ``[S, channels]``."""
    distances: list[Tensor] = field(default_factory=list)
    """Left when observing: per layer the distance of each stream's batch to the source, ``[S]``."""


class Conduit:
    """Hands the current :class:`Pass` of a model to its norm layers."""

    def __init__(self) -> None:
        self.current: Pass | None = None

    def get(self, x: Tensor) -> Pass:
        """The pass in which a layer gets ``x``, whose first dimension must be the rows."""
        if self.current is None:
            raise RuntimeError("a norm layer ran outside of a forward pass of the engine")
        if len(x) != self.current.segments.rows:
            raise RuntimeError(
                f"a norm layer got {list(x.shape)} in a batch of {self.current.segments.rows} rows: streams can only "
                "be told apart where rows are the first dimension (is the model sequence-first, or does it fold rows?)"
            )
        return self.current


class StreamNorm(nn.Module):
    """Base of the layers: keeps the original's parameters under their names, frozen."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, original: Any, name: str, conduit: Conduit) -> None:
        super().__init__()
        self.register_parameter("weight", original.weight)
        self.register_parameter("bias", original.bias)
        self.name, self._conduit = name, conduit
        self.eps = float(original.eps)

    def _is_shared(self, now: Pass) -> bool:
        """Whether no stream has a tensor of its own for this layer."""
        return not any(f"{self.name}.{key}" in now.weights for key in (*self._parameters, *self._buffers))

    def _own(self, key: str, now: Pass) -> Tensor | None:
        """The streams' tensor ``[S, ...]`` of this layer under ``key``; else the source's, as ``[1, ...]``."""
        name = f"{self.name}.{key}"
        # A running norm that runs twice in a pass goes on from its first time.
        stacked = now.statistics.get(name, now.weights.get(name))
        if stacked is not None:
            return stacked
        source: Tensor | None = getattr(self, key)
        return None if source is None else source.unsqueeze(0)


class StreamBatchNorm(StreamNorm):
    """Batch norm 1d, 2d or 3d over ``x [N, channels, ...]``."""

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, original: Any, name: str, conduit: Conduit) -> None:
        super().__init__(original, name, conduit)
        self.register_buffer("running_mean", original.running_mean)
        self.register_buffer("running_var", original.running_var)
        self.channels = int(original.num_features)

    def forward(self, x: Tensor) -> Tensor:
        now = self._conduit.get(x)
        if now.observe and self.running_mean is not None and self.running_var is not None:
            now.distances.append(_distance(x, now.segments, self.running_mean, self.running_var, self.eps))
        if now.norm == SOURCE_NORM and self._is_shared(now) and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        gamma, beta = self._own("weight", now), self._own("bias", now)
        gamma = x.new_ones(1, self.channels) if gamma is None else gamma
        beta = x.new_zeros(1, self.channels) if beta is None else beta
        mean, var = self._own("running_mean", now), self._own("running_var", now)
        norm = now.norm
        if mean is None or var is None:
            # The source itself keeps no statistics here: its only mode is the batch's.
            mean, var, norm = x.new_zeros(1, self.channels), x.new_ones(1, self.channels), BATCH_NORM
        y: Tensor
        y, mean, var = _SegmentBatchNorm.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            x, gamma, beta, mean, var, now.segments, norm, self.eps
        )
        if norm.running and self.running_mean is not None:
            now.statistics[f"{self.name}.running_mean"] = mean
            now.statistics[f"{self.name}.running_var"] = var
        return y.view_as(x)


class StreamLayerNorm(StreamNorm):
    """Layer norm over the trailing ``shape`` of ``x [N, ..., *shape]``: only its affine part is per stream."""

    def __init__(self, original: nn.LayerNorm, name: str, conduit: Conduit) -> None:
        super().__init__(original, name, conduit)
        self.shape = original.normalized_shape

    def forward(self, x: Tensor) -> Tensor:
        now = self._conduit.get(x)
        if self._is_shared(now):
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        y = F.layer_norm(x, self.shape, None, None, self.eps)
        between = [1] * (x.dim() - 1 - len(self.shape))
        return _affine(y, self._own("weight", now), self._own("bias", now), now.segments, lambda one: [*between, *one])


class StreamGroupNorm(StreamNorm):
    """Group norm over ``x [N, channels, ...]``: only its affine part is per stream."""

    def __init__(self, original: nn.GroupNorm, name: str, conduit: Conduit) -> None:
        super().__init__(original, name, conduit)
        self.groups = original.num_groups

    def forward(self, x: Tensor) -> Tensor:
        now = self._conduit.get(x)
        if self._is_shared(now):
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        y = F.group_norm(x, self.groups, None, None, self.eps)
        after = [1] * (x.dim() - 2)
        return _affine(y, self._own("weight", now), self._own("bias", now), now.segments, lambda one: [*one, *after])


REPLACED: dict[type[nn.Module], type[StreamNorm]] = {
    nn.BatchNorm1d: StreamBatchNorm,
    nn.BatchNorm2d: StreamBatchNorm,
    nn.BatchNorm3d: StreamBatchNorm,
    nn.LayerNorm: StreamLayerNorm,
    nn.GroupNorm: StreamGroupNorm,
}
"""Exactly these types are replaced. A subclass may do more in its forward, so it is left as it is."""


def replace_norms(model: nn.Module, conduit: Conduit) -> list[str]:
    """Puts stream-wise layers in the place of the model's norm layers; returns their names. Mutates ``model``."""
    made: dict[nn.Module, StreamNorm] = {}
    # Torch names a tensor by the first way to its layer; a layer found in another place has to go by the same name.
    names = {module: name for name, module in model.named_modules()}
    for parent in list(names):
        for child_name, child in list(parent._modules.items()):  # named_children names a shared child once
            kind = REPLACED.get(type(child))
            if child is not None and kind is not None:
                made.setdefault(child, kind(child, names[child], conduit))
                setattr(parent, child_name, made[child])
    return [layer.name for layer in made.values()]


class _Moments(NamedTuple):
    """``x = centred + row_mean``, ``centred [N, channels, L]`` and ``row_mean [N, channels]``; ``mean`` and biased
    ``var`` per stream, ``[S, channels]``; ``shift = row_mean - mean`` of the row's stream, ``[N, channels]``."""

    centred: Tensor
    row_mean: Tensor
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


def _flat(x: Tensor) -> Tensor:
    """``[N, channels]`` or ``[N, channels, ...]`` as ``[N, channels, L]``."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def _distance(x: Tensor, segments: Segments, source_mean: Tensor, source_var: Tensor, eps: float) -> Tensor:
    """Normalised squared 2-Wasserstein distance of each stream's batch statistics to the source's -> ``[S]``.

    ``mean_c [(m - M)^2 + (sqrt v - sqrt V)^2] / (V + eps)``, dimensionless; ``eps`` is the layer's own, so that a dead
    channel, of no variance in the source, does not count for more than the layer makes of it.
    """
    with torch.no_grad():
        _, _, mean, var, _ = _moments(_flat(x), segments)
        squared = (mean - source_mean).square() + (var.sqrt() - source_var.sqrt()).square()
        return (squared / (source_var + eps)).mean(1)


def _affine(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    segments: Segments,
    view: Callable[[torch.Size], list[int]],
) -> Tensor:
    """``y`` scaled and shifted by ``[S or 1, ...]`` tensors; ``view`` gives their shape without rows, ready to
    broadcast over ``y``."""
    if gamma is not None:
        scale = _per_row(gamma, segments)
        y = y * scale.view(len(scale), *view(gamma.shape[1:]))
    if beta is not None:
        shift = _per_row(beta, segments)
        y = y + shift.view(len(shift), *view(beta.shape[1:]))
    return y


class _SegmentBatchNorm(torch.autograd.Function):
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
            shift = -_per_row(mean, segments)
        else:
            rows, row_mean, batch_mean, batch_var, batch_shift = _moments(rows, segments)
            if norm == BATCH_NORM and min(segments.sizes) * positions > 1:
                mean, var, shift = batch_mean, batch_var, batch_shift
            else:
                values = segments.rows_per_stream(x.dtype) * positions
                # One value per channel has no variance: such streams keep the reference.
                weight = (values > 1).to(x.dtype) * norm.weight
                if norm != BATCH_NORM:
                    batch_var = batch_var * (values / (values - 1).clamp_min(1))
                mean, var = torch.lerp(mean, batch_mean, weight), torch.lerp(var, batch_var, weight)
                shift = row_mean - segments.spread(mean)
        r = (var + eps).rsqrt_()
        a = gamma * r
        row_a = _per_row(a, segments)
        y = rows * row_a.unsqueeze(2)
        y += torch.addcmul(_per_row(beta, segments), row_a, shift).unsqueeze(2)
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
        g = g_y
        row_g = g.sum(2)
        g_beta = segments.sum(row_g)
        g_gamma = segments.sum((g * rows).sum(2).addcmul_(row_g, shift)).mul_(r)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = g * row_a.unsqueeze(2)
            if batch_shift is not None:
                values = segments.rows_per_stream(g.dtype) * rows.shape[2]
                through = a / -values if weight is None else a / -values * weight
                slope = through * r * g_gamma
                if ctx.norm != BATCH_NORM:
                    slope *= values / (values - 1).clamp_min(1)
                row_slope = segments.spread(slope)
                offset = torch.addcmul(segments.spread(through * g_beta), row_slope, batch_shift)
                g_x.addcmul_(rows, row_slope.unsqueeze(2)).add_(offset.unsqueeze(2))
            g_x = g_x.view(ctx.shape)
        if ctx.shared[0]:
            g_gamma = g_gamma.sum(0, keepdim=True)
        if ctx.shared[1]:
            g_beta = g_beta.sum(0, keepdim=True)
        return g_x, g_gamma, g_beta, None, None, None, None, None


def _per_row(streams: Tensor, segments: Segments) -> Tensor:
    """``[S, channels]`` -> ``[N, channels]``; what is shared by all streams, ``[1, channels]``, stays as it is."""
    return streams if len(streams) == 1 else segments.spread(streams)
