"""``roid``: universal test-time adaptation by weight ensembling, diversity weighting and prior correction (Marsden et
al., WACV 2024, arXiv 2306.00650).

Per request of a stream of ``B`` rows and ``C`` classes, with ``p_i`` the prediction for row ``i`` and ``q`` the moving
mean of predictions, uniform at first (sections 3.1 to 3.4 of the paper):

    d_i = 1 - cos(q, p_i),  c_i = -H(p_i),  both scaled to [0, 1] over the request
    w_i = exp(d_i c_i / tau), and 0 where d_i < mean_j d_j                                    (certainty and diversity)
    q <- 0.9 q + 0.1 mean_i p_i
    SLR_i = -sum_c p_ic ln(p_ic / (1 - p_ic) + 1e-5), with p_ic at most 0.99                  (soft likelihood ratio)
    L = 1/B0 sum_i w_i (SLR_i + SCE(f(augment(x_i)), f(x_i)))                                 (consistency)
    theta <- theta - lr grad L,  then  theta <- 0.99 theta + 0.01 theta_source                (weight ensembling)
    answer: z_i + ln pi,  pi = (mean_i p_i + g) / (1 + g C),  g = max(1/B, 1/C) / max_c mean_i p_ic    (the prior)

``theta`` are the scales and shifts of all norm layers, ``w_i`` constants. The augmented rows are those of weight above
0, a batch of their own. ``z`` are the logits before the step. ``B0`` is a constant, so small requests take small steps.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapters import gradient, losses
from adapters.augment import PLAIN, augment, check
from adapters.base import Batch, Segments, Source, State, Step, register
from adapters.entropy import DESCENT, IMAGENET, AffinePolicy


@register
@dataclass(frozen=True)
class Roid(AffinePolicy):
    """Self-training with certainty and diversity weights, kept near the source, corrected by the class prior.

    ``prior``: what corrects the answer. ``log_prior`` adds the logarithm of the request's smoothed class prior to the
    logits, which multiplies probabilities; ``logits`` multiplies the logits themselves, as the authors' code does and
    the published numbers have it; ``none``. Small requests of a ``window`` are answered without it, since a prior is
    one of a whole batch. ``weighting``: whether rows have weights; without, all count alike. ``consistency``: whether
    augmented rows are to give the same answer, at the cost of a forward pass on about half the rows; it needs images.

    ``batch_size``: ``B0``, 200 for CIFAR and 64 for ImageNet. ``temperature``: ``tau``. ``clip``: of the probabilities
    in the likelihood ratio. ``class_momentum``: of ``q``. ``source_momentum``: of the weights against the source's.
    """

    name = "roid"
    ranges = DESCENT | {
        "batch_size": "[1, inf)",
        "temperature": "(0, inf)",
        "clip": "(0, 1)",
        "class_momentum": "[0, 1]",
        "source_momentum": "[0, 1]",
    }
    presets = {"imagenet": IMAGENET | {"nesterov": True, "batch_size": 64}}

    prior: Literal["log_prior", "logits", "none"] = "log_prior"
    weighting: bool = True
    consistency: bool = True
    batch_size: int = 200
    temperature: float = 1 / 3
    clip: float = 0.99
    class_momentum: float = 0.9
    source_momentum: float = 0.99

    def init(self, source: Source) -> State:
        if self.consistency:
            check(source)
        state, classes = super().init(source), source.num_classes
        uniform = torch.full((1, classes), 1 / classes, dtype=source.dtype, device=source.device)
        return State(state.weights, state.memory | {"roid.classes": uniform})

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        segments, known = batch.segments, state.memory["roid.classes"]
        weights = gradient.leaves(state.weights)
        logits = batch.forward(weights, batch.x).logits
        p = logits.detach().softmax(1)
        mean = segments.mean(p)
        yield self.corrected(logits.detach(), mean, segments)

        weight, kept = self.weigh(known, logits.detach(), segments)
        loss = segments.sum(weight * soft_likelihood_ratio(logits, self.clip))
        index, some = segments.select(kept)  # each stream keeps a row: not all are below their mean
        if self.consistency:
            x = augment(batch.x[index], some, source, batch.random.named("augment"), PLAIN)
            distance = losses.symmetric_cross_entropy(batch.forward(weights, x, some).logits, logits[index])
            loss = loss + some.sum(weight[index] * distance)
        gradients = gradient.per_stream(loss / self.batch_size, weights)
        moved, memory = self.descent.update(state.weights, gradients, state.memory)
        pull = 1 - self.source_momentum
        moved = {key: torch.lerp(value, source.weights[key], pull) for key, value in moved.items()}
        memory["roid.classes"] = torch.lerp(known, mean, 1 - self.class_momentum)
        share = some.rows_per_stream(p.dtype) / segments.rows_per_stream(p.dtype)
        return Step(State(moved, memory), {"loss": loss.detach() / self.batch_size, "selected": share.squeeze(1)})

    def weigh(self, known: Tensor, logits: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """``w [N]``, and which rows are kept, ``[N]`` (bool)."""
        if not self.weighting:
            return torch.ones_like(logits[:, 0]), torch.ones_like(logits[:, 0], dtype=torch.bool)
        similarity = torch.cosine_similarity(segments.spread(known), logits.softmax(1), dim=1)
        diversity, certainty = _scaled(1 - similarity, segments), _scaled(-losses.entropy(logits), segments)
        kept = ~(diversity < segments.spread(segments.mean(diversity)))  # so NaN is kept, and fails by itself
        return torch.where(kept, (diversity * certainty / self.temperature).exp(), 0.0), kept

    def corrected(self, logits: Tensor, mean: Tensor, segments: Segments) -> Tensor:
        """The answer ``[N, C]`` for ``logits``, with ``mean [S, C]`` the streams' mean predictions."""
        if self.prior == "none":
            return logits
        classes = logits.shape[1]
        least = segments.rows_per_stream(mean.dtype).reciprocal().clamp_min(1 / classes)
        smoothing = least / mean.amax(1, keepdim=True)
        prior = segments.spread((mean + smoothing) / (1 + smoothing * classes))
        return logits + prior.log() if self.prior == "log_prior" else logits * prior


def soft_likelihood_ratio(logits: Tensor, clip: float) -> Tensor:
    """``-sum_c p_c ln(p_c / (1 - p_c) + 1e-5)`` with ``p`` the softmax of ``logits [N, C]``, at most ``clip`` ->
    ``[N]``."""
    p = logits.softmax(1).clamp_max(clip)
    return -(p * (p / (1 - p) + 1e-5).log()).sum(1)


def _scaled(rows: Tensor, segments: Segments) -> Tensor:
    """``rows [N]`` moved and stretched to [0, 1] in each stream; 0, which makes weights 1, where all are equal."""
    least, most = (
        segments.spread(torch.segment_reduce(rows, end, lengths=segments.counts, unsafe=True)) for end in ("min", "max")
    )
    spread = most - least
    return torch.where(spread < 1e-12, 0.0, (rows - least) / spread)
