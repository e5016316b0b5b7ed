"""The oracle of ``roid``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from adapters.rng import Random
from tests.adapters.oracles.entropy import EntropyOracle
from tests.adapters.slow_augment import slow_augment

RECIPE = SimpleNamespace(
    brightness=(0.6, 1.4),
    contrast=(0.7, 1.3),
    saturation=(0.5, 1.5),
    hue=(-0.06, 0.06),
    gamma=(0.7, 1.3),
    rotation=(-15, 15),
    translation=1 / 16,
    scale=(0.9, 1.1),
    blur=None,
    noise=0,
    padding="reflect",
    flip=0.5,
)


class RoidOracle(EntropyOracle):
    """Weights from certainty and diversity, likelihood ratios and augmented rows, a pull to the source, a prior."""

    def __init__(self, original: nn.Module, settings: Any, artefacts: Mapping[str, Tensor]) -> None:
        super().__init__(original, settings, artefacts)
        self.known: Tensor | None = None

    def step(self, x: Tensor, random: Random) -> Tensor:
        s = self.settings
        logits: Tensor = self.network(x)
        p = logits.detach().softmax(1)
        rows, classes = p.shape
        if self.known is None:
            self.known = torch.full((classes,), 1 / classes, dtype=p.dtype)
        weights = self.weights(p) if s.weighting else [1.0] * rows
        kept = [i for i in range(rows) if weights[i] > 0]
        self.known = s.class_momentum * self.known + (1 - s.class_momentum) * p.mean(0)
        loss = torch.zeros(())
        for i in kept:
            loss = loss + weights[i] * self.ratio(logits[i]) / s.batch_size
        if s.consistency:
            views = self.network(augmented(x[kept], random))
            for i, view in zip(kept, views, strict=True):
                a, b = view.softmax(0), logits[i].softmax(0)
                loss = loss - weights[i] * ((a * b.log()).sum() + (b * a.log()).sum()) / 2 / s.batch_size
        self.descend(loss)
        with torch.no_grad():
            for key, value in self.theta.items():
                value.copy_(s.source_momentum * value + (1 - s.source_momentum) * self.start[key])
        return self.answer(logits.detach(), p.mean(0))

    def weights(self, p: Tensor) -> list[float]:
        assert self.known is not None
        diversity = [1 - float(row @ self.known / row.norm() / self.known.norm()) for row in p]
        certainty = [float((row * row.log()).sum()) for row in p]
        scaled = []
        for values in (diversity, certainty):
            low, high = min(values), max(values)
            scaled.append([(value - low) / (high - low) if high - low > 1e-12 else 0.0 for value in values])
        least = sum(scaled[0]) / len(p)
        return [
            math.exp(d * c / self.settings.temperature) if d >= least else 0.0 for d, c in zip(*scaled, strict=True)
        ]

    def ratio(self, logits: Tensor) -> Tensor:
        total = torch.zeros(())
        for q in logits.softmax(0):
            q = q if q < self.settings.clip else torch.tensor(self.settings.clip, dtype=q.dtype)
            total = total - q * torch.log(q / (1 - q) + 1e-5)
        return total

    def answer(self, logits: Tensor, mean: Tensor) -> Tensor:
        rows, classes = logits.shape
        smoothing = max(1 / rows, 1 / classes) / float(mean.max())
        prior = (mean + smoothing) / (1 + smoothing * classes)
        if self.settings.prior == "log_prior":
            return (logits.softmax(1) * prior).log() + logits.logsumexp(1, keepdim=True)
        return logits * prior if self.settings.prior == "logits" else logits

    def state(self) -> dict[str, Tensor]:
        assert self.known is not None
        return super().state() | {"memory/roid.classes": self.known}


def augmented(x: Tensor, random: Random) -> Tensor:
    """One view of each image, by the same draws."""
    drawn = random.named("augment").uniform((16,))[0].tolist()
    views = [slow_augment(image.permute(1, 2, 0).numpy(), drawn, None, RECIPE, endless=True) for image in x]
    return torch.stack([torch.from_numpy(view).permute(2, 0, 1) for view in views])


ORACLES = {"roid": RoidOracle}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "roid": {
        "adam": {"lr": 0.02, "batch_size": 5},
        "sgd": {"optimiser": "sgd", "lr": 0.1, "batch_size": 4, "prior": "logits", "source_momentum": 0.9},
        "weights_only": {"optimiser": "sgd", "lr": 0.1, "batch_size": 4, "consistency": False, "clip": 0.6},
        "consistency_only": {"lr": 0.01, "batch_size": 4, "weighting": False, "prior": "none"},
    },
}
