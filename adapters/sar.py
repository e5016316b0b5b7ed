"""``sar``: sharpness-aware and reliable entropy minimisation (Niu et al., ICLR 2023, arXiv 2302.12400).

Per request of a stream, with ``H_i(theta)`` the entropy of the prediction for row ``i`` and ``theta`` the scales and
shifts of all norm layers but the topmost (section 3.2 of the paper):

    R1 = {i : H_i(theta) < E0},                      g = grad mean_{R1} H_i(theta)
    theta^ = theta + rho g / (|g| + 1e-12)                                          (the sharpest point near by)
    R2 = {i in R1 : H_i(theta^) < E0},               L = mean_{R2} H_i(theta^)
    theta <- theta - lr grad L(theta^)                                              (step from theta, not theta^)
    e <- 0.9 e + 0.1 L, and L at the first;          start afresh from the source when e < e_m

``|g|`` is the 2-norm over all that the stream adapts. Both forward passes see all rows. An empty ``R1`` or ``R2`` means
no step, and ``e`` stays. To start afresh means weights, moments and ``e``. The answer is the one computed before.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapters import gradient, losses
from adapters.base import Batch, Source, State, Step, Tensors, register
from adapters.entropy import IMAGENET, SETTINGS, PartialEntropyPolicy

_UNKNOWN = -1.0
"""The moving average of a loss, which is never negative, before there was any."""


@register
@dataclass(frozen=True)
class Sar(PartialEntropyPolicy):
    """Entropy minimisation on reliable samples, towards flat minima, with a reset when it collapses.

    ``optimiser``: ``sgd``, published as 2.5e-4 for batches of 64 ImageNet images; for small ones the authors take
    ``2 * 2.5e-4 / 64`` per image, for ViTs ``1e-3 / 64``. ``rho``: the size of the step to the sharpest point.
    ``entropy_margin``: ``E0`` as a share of the greatest entropy, ``ln C``. ``reset_below``: ``e_m`` in nats. The
    authors' 0.2 is for 1,000 classes, where a healthy model stays above it; ``None`` scales it to the model's,
    ``0.2 ln C / ln 1000``. 0: never.

    With ``ostta`` its term is part of the loss at either point, and its filter is applied at the first.
    """

    name = "sar"
    ranges = SETTINGS | {"rho": "[0, inf)", "entropy_margin": "[0, inf)", "reset_below": "[0, inf)"}
    presets = {"imagenet": IMAGENET}

    optimiser: Literal["adam", "sgd"] = "sgd"
    rho: float = 0.05
    entropy_margin: float = 0.4
    reset_below: float | None = None

    def init(self, source: Source) -> State:
        state = super().init(source)
        unknown = torch.full((1,), _UNKNOWN, dtype=torch.float64, device=source.device)
        return State(state.weights, state.memory | {"sar.loss": unknown})

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        weights = gradient.leaves(state.weights)
        logits = batch.forward(weights, batch.x).logits
        yield logits.detach()
        segments, margin = batch.segments, self.entropy_margin * math.log(source.num_classes)
        kept, crowd = self.crowd(source, batch, logits)
        entropy = losses.entropy(logits)
        reliable = kept & (entropy.detach() < margin)
        found = self.counts(segments.sum(reliable.to(entropy.dtype)))
        nothing = torch.zeros_like(crowd)
        if not found.any():
            return Step(state, {"loss": nothing, "selected": nothing, "recovered": nothing})

        loss = losses.mean_of_chosen(entropy, reliable, segments) + crowd
        climbed = gradient.leaves(_ascend(state.weights, gradient.per_stream(loss, weights), self.rho))
        # Streams without a reliable row need no second look.
        index, some = segments.select(segments.spread(found))
        again = batch.forward(climbed, batch.x[index], some).logits
        entropy = losses.entropy(again)
        reliable = reliable[index] & (entropy.detach() < margin)
        count = some.sum(reliable.to(entropy.dtype))
        active = found & self.counts(count)
        if not active.any():
            return Step(state, {"loss": nothing, "selected": nothing, "recovered": nothing})

        sharp = losses.mean_of_chosen(entropy, reliable, some)
        loss = sharp + self.marginal(some, again)
        moved, memory = self.descent.update(state.weights, gradient.per_stream(loss, climbed), state.memory, active)
        known = state.memory["sar.loss"]
        sharp = sharp.detach().to(known.dtype)
        blended = torch.where(known >= 0, torch.lerp(known, sharp, 0.1), sharp)
        memory["sar.loss"] = torch.where(count > 0, blended, known)
        collapsed = (count > 0) & (memory["sar.loss"] < self._least(source))
        if collapsed.any():
            fresh = self.init(source)
            moved, memory = _where(collapsed, fresh.weights, moved), _where(collapsed, fresh.memory, memory)
        signals = {
            "loss": torch.where(active, loss.detach(), 0.0),
            "selected": count / segments.rows_per_stream(count.dtype).squeeze(1),
            "recovered": collapsed.to(count.dtype),
        }
        return Step(State(moved, memory), signals)

    def _least(self, source: Source) -> float:
        if self.reset_below is None:
            return 0.2 * math.log(source.num_classes) / math.log(1000)
        return self.reset_below


def _ascend(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rho: float) -> Tensors:
    """``theta + rho g / (|g| + 1e-12)``, with the norm over all tensors of a stream."""
    squared = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
    scale = rho / (squared.sqrt() + 1e-12)
    return {key: value + scale.view(-1, *[1] * (value.dim() - 1)) * gradients[key] for key, value in weights.items()}


def _where(mask: Tensor, fresh: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tensors:
    """``fresh [1, ...]`` for the streams of ``mask [S]``, ``old [S, ...]`` for the others."""
    return {key: torch.where(mask.view(-1, *[1] * (value.dim() - 1)), fresh[key], value) for key, value in old.items()}
