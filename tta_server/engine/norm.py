"""Norm layers that normalise every stream by itself.

They stand in for the model's own, under the same parameter names, and read what the current pass needs from the one
:class:`Pass` of the model: whose rows these are, the streams' own scales and shifts, and which statistics to use.

How batch norms compute is in ``segment_norm.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import BATCH_NORM, SOURCE_NORM, Norm, Segments, Tensors
from tta_server.engine.segment_norm import SegmentBatchNorm, batch_statistics, by_kernel, per_row
from tta_server.engine.traced import is_tracing
from tta_server.engine.triton_norm import TritonBatchNorm, available


@dataclass
class Pass:
    """What the norm layers of one model read and leave during one forward pass. Used by one thread only."""

    segments: Segments
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    norm: Norm = SOURCE_NORM
    observe: bool = False
    """Leave what each batch-norm layer's inputs are like in each stream, while normalising as ``norm`` says."""
    statistics: Tensors = field(default_factory=dict)
    """Left by running batch norms: the streams' new means and variances, ``[S, channels]``."""
    observed: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    """Left when observing: per batch-norm layer that has source statistics its name, and each stream's mean and biased
    variance, ``[S, channels]``."""

    @property
    def each(self) -> int:
        """Segments of each stream, side by side: several where its rows are normalised in parts."""
        own = next(iter(self.weights.values()), None)
        return 1 if own is None else self.segments.streams // len(own)

    def by_segment(self) -> Pass:
        """The same with weights for each segment."""
        if self.each == 1:
            return self
        return replace(self, weights={key: one.repeat_interleave(self.each, 0) for key, one in self.weights.items()})


class Conduit:
    """Hands the current :class:`Pass` of a model to its norm layers.

    ``pause``, if there is one, is called whenever a norm of the streams' own has run, on the way forward and on the way
    back: other passes of the same network may run in it.
    """

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.pause: Callable[[], None] | None = None
        self.only_on_the_way_back = False
        """For a network that keeps values of a pass outside of it."""

    def rest(self, y: Tensor) -> Tensor:
        """``y``, which a layer made; the place to pause at, now and when its gradient is known."""
        if self.pause is not None and not self.only_on_the_way_back:
            self.pause()
        if y.requires_grad:
            y.register_hook(self._rest_on_the_way_back)
        return y

    def _rest_on_the_way_back(self, gradient: Tensor) -> None:
        if self.pause is not None:
            self.pause()

    def get(self, x: Tensor) -> Pass:
        """The pass in which a layer gets ``x``, whose first dimension must be the rows."""
        if self.current is None:
            raise RuntimeError("a norm layer ran outside of a forward pass of the engine")
        if not is_tracing() and len(x) != self.current.segments.rows:
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
            now.observed.append((self.name, *batch_statistics(x, now.segments)))
        if now.norm == SOURCE_NORM and self._is_shared(now) and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        gamma, beta = self._own("weight", now), self._own("bias", now)
        gamma = x.new_ones(1, self.channels) if gamma is None else gamma
        beta = x.new_zeros(1, self.channels) if beta is None else beta
        mean, var = self._own("running_mean", now), self._own("running_var", now)
        norm = now.norm
        if mean is None or var is None:
            # The source itself keeps no statistics here: its only mode is the batch's.
            mean, var = x.new_zeros(1, self.channels), x.new_ones(1, self.channels)
            norm = replace(BATCH_NORM, median=norm.median)

        def written_out(x: Tensor, own: slice, segments: Segments) -> Tensor:
            kind = TritonBatchNorm if available(x, norm) else SegmentBatchNorm
            tensors = (one if len(one) == 1 else one[own] for one in (gamma, beta, mean, var))
            y: Tensor
            y, *used = kind.apply(x, *tensors, segments, norm, self.eps)  # type: ignore[no-untyped-call]  # torch's
            if norm.running and self.running_mean is not None:
                for key, value in zip(("running_mean", "running_var"), used, strict=True):
                    now.statistics[f"{self.name}.{key}"] = value
            return y.view_as(x)

        if norm == BATCH_NORM and x.is_cpu and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return self._conduit.rest(by_kernel(x, gamma, beta, now.segments, self.eps, written_out))
        return self._conduit.rest(written_out(x, slice(None), now.segments))


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
        return self._conduit.rest(
            _affine(y, self._own("weight", now), self._own("bias", now), now.segments, lambda one: [*between, *one])
        )


class StreamGroupNorm(StreamNorm):
    """Group norm over ``x [N, channels, ...]``: only its affine part is per stream."""

    def __init__(self, original: nn.GroupNorm, name: str, conduit: Conduit) -> None:
        super().__init__(original, name, conduit)
        self.groups = original.num_groups

    def forward(self, x: Tensor) -> Tensor:
        now = self._conduit.get(x)
        if self._is_shared(now):
            return self._normalise(x, self.weight, self.bias)
        y = self._normalise(x, None, None)
        after = [1] * (x.dim() - 2)
        return self._conduit.rest(
            _affine(y, self._own("weight", now), self._own("bias", now), now.segments, lambda one: [*one, *after])
        )

    def _normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """As torch does where a channel's values are side by side: it cuts a batch of channels_last into parts that
        depend on its size."""
        y = F.group_norm(x.contiguous(), self.groups, weight, bias, self.eps)
        if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            return y.contiguous(memory_format=torch.channels_last)
        return y


REPLACED: dict[type[nn.Module], type[StreamNorm]] = {
    nn.BatchNorm1d: StreamBatchNorm,
    nn.BatchNorm2d: StreamBatchNorm,
    nn.BatchNorm3d: StreamBatchNorm,
    nn.LayerNorm: StreamLayerNorm,
    nn.GroupNorm: StreamGroupNorm,
}
"""Exactly these types are replaced. A subclass may do more in its forward, so it is left as it is."""


KINDS = ("weight", "bias", "running_mean", "running_var")
"""What a norm layer may hold."""


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
        scale = per_row(gamma, segments)
        y = y * scale.view(len(scale), *view(gamma.shape[1:]))
    if beta is not None:
        shift = per_row(beta, segments)
        y = y + shift.view(len(shift), *view(beta.shape[1:]))
    return y
