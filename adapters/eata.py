"""``eata`` and ``eta``: entropy minimisation on reliable, non-redundant samples, with an anchor to the source (Niu et
al., ICML 2022, arXiv 2204.02610).

Per request of a stream, with ``p_i`` the prediction and ``H_i`` its entropy (section 4 of the paper):

    reliable      H_i < E0                                                                   (equation 3)
    new           |cos(m, p_i)| < eps, with m the moving mean of accepted predictions        (equation 5)
    L = 1/|S| sum_{i in S} exp(E0 - H_i) H_i + beta sum_k omega_k (theta_k - theta0_k)^2     (equations 2, 4, 8)
    m <- 0.9 m + 0.1 mean_S p_i, and mean_S p_i at the first                                 (equation 6)

``S`` are the rows that are both; the weights are constants to the gradient. ETA is the same without the last term. An
empty ``S`` means no step, no backward pass and an unchanged ``m``. The answer is the one computed before the step.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters import gradient, losses
from adapters.base import Batch, Source, State, Step, Tensors, register
from adapters.entropy import IMAGENET, SETTINGS, EntropyPolicy


@register
@dataclass(frozen=True)
class Eta(EntropyPolicy):
    """Entropy minimisation on reliable and non-redundant samples.

    ``entropy_margin``: ``E0`` as a share of the greatest entropy, ``ln C``. ``cosine_margin``: ``eps``; the authors'
    0.05 is for ImageNet, 0.4 is in use for CIFAR-10.
    """

    name = "eta"
    ranges = SETTINGS | {"entropy_margin": "[0, inf)", "cosine_margin": "[0, inf)"}
    presets = {"imagenet": IMAGENET | {"cosine_margin": 0.05}}

    entropy_margin: float = 0.4
    cosine_margin: float = 0.4

    def init(self, source: Source) -> State:
        state = super().init(source)
        mean = torch.zeros(1, source.num_classes, dtype=source.dtype, device=source.device)  # zero: none accepted yet
        return State(state.weights, state.memory | {"eata.mean": mean})

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        weights = gradient.leaves(state.weights)
        logits = batch.forward(weights, batch.x).logits
        yield logits.detach()
        segments, mean = batch.segments, state.memory["eata.mean"]
        entropy, p = losses.entropy(logits), logits.detach().softmax(1)
        threshold = self.entropy_margin * math.log(source.num_classes)
        reliable = entropy.detach() < threshold
        is_known = mean.sum(1) > 0
        similarity = torch.cosine_similarity(segments.spread(mean), p, dim=1).abs()
        chosen = reliable & ((similarity < self.cosine_margin) | ~segments.spread(is_known))
        kept, crowd = self.crowd(source, batch, logits)
        chosen &= kept
        count = segments.sum(chosen.to(p.dtype))
        active, share = self.counts(count), count / segments.rows_per_stream(p.dtype).squeeze(1)
        if not active.any():
            return Step(state, {"loss": torch.zeros_like(share), "selected": share})

        weighted = (threshold - entropy.detach()).exp() * entropy
        loss = losses.mean_of_chosen(weighted, chosen, segments) + crowd + self._anchor(source, weights)
        gradients = gradient.per_stream(loss, weights)
        moved, memory = self.descent.update(state.weights, gradients, state.memory, active)
        accepted = segments.sum(p * chosen[:, None]) / count.clamp_min(1)[:, None]
        blended = torch.where(is_known[:, None], torch.lerp(mean, accepted, 0.1), accepted)
        memory["eata.mean"] = torch.where(count[:, None] > 0, blended, mean)
        return Step(State(moved, memory), {"loss": torch.where(active, loss.detach(), 0.0), "selected": share})

    def _anchor(self, source: Source, weights: Tensors) -> Tensor | float:
        return 0.0


@register
@dataclass(frozen=True)
class Eata(Eta):
    """ETA with a penalty that keeps weights which matter to the source near it.

    ``fisher_weight``: ``beta``, 2000 for ImageNet and 1 for CIFAR. Its size goes with the batch that the Fisher
    information ``omega`` was computed with.
    """

    name = "eata"
    ranges = Eta.ranges | {"fisher_weight": "[0, inf)"}
    presets = {"imagenet": Eta.presets["imagenet"] | {"fisher_weight": 2000.0}}

    fisher_weight: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"fisher"})

    def _anchor(self, source: Source, weights: Tensors) -> Tensor:
        total = torch.zeros(len(next(iter(weights.values()))), dtype=source.dtype, device=source.device)
        for key, omega in source.artefact("fisher").items():
            total = total + (omega * (weights[key] - source.weights[key]).square()).flatten(1).sum(1)
        return self.fisher_weight * total


def squared_gradient(source: Source, batch: Batch) -> Tensors:
    """One batch's share of the Fisher information: ``(d CE / d theta_k)^2``, without a stream dimension.

    The loss is the mean cross entropy of the batch to the model's own labels, so this is the square of a mean, as the
    authors' code has it; the Fisher information is its average over batches.
    """
    weights = gradient.leaves(source.stacked(source.affine))
    logits = batch.forward(weights, batch.x).logits
    loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1), reduction="mean")
    return {key: value[0].square() for key, value in gradient.per_stream(loss[None], weights).items()}
