"""What is measured of a stream's requests: the signals and their formulas. Pure numpy over a step's rows.

``N`` rows belong to ``S`` requests, one after the other; ``starts [S]`` is where each begins, ``sizes [S]`` how many it
has. The *source path* is the frozen model on the same inputs; what says how far a stream is from its source is
measured there, where no adaptation has made up for it yet. The *served path* is what the client was answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Values = dict[str, Floats]
"""Signals by name, one value per request: ``[S]``, NaN where it was not measured."""

DRIFT = "feature_distance"
"""The signal whose windowed z-score is the drift score, and on which the verdict rests."""
DISTANCE = "bn_distance"
AGREEMENT = "agreement"
BENEFIT = "benefit"


class Signal(NamedTuple):
    """What a signal is. ``log``: its logarithm is compared with clean data's (a distance: positive and skewed).
    ``table``: whether clean data say what to expect of it."""

    text: str
    log: bool = False
    table: bool = True


SIGNALS: dict[str, Signal] = {
    "feature_distance": Signal(
        "source path: diagonal Frechet distance of the features to what clean data of the predicted classes have", True
    ),
    "bn_distance": Signal(
        "source path: normalised squared 2-Wasserstein distance of the batch-norm statistics, mean over layers", True
    ),
    "bn_distance_max": Signal("source path: the same of the farthest layer", True),
    "bn_distance_early": Signal("source path: the same over the first third of the layers", True),
    "bn_distance_middle": Signal("source path: the same over the second third", True),
    "bn_distance_late": Signal("source path: the same over the last third", True),
    "source_entropy": Signal("source path: entropy of the probabilities over ln(classes), mean over rows"),
    "source_energy": Signal("source path: -logsumexp(logits), mean over rows; nats"),
    "label_skew": Signal("source path: 1 - H(mean probabilities) / ln(classes)"),
    "agreement": Signal("share of rows whose served class is the source's", table=False),
    "skew_damage": Signal(
        "Jensen-Shannon divergence of mean served and mean source probabilities, 0 to 1", table=False
    ),
    "confidence": Signal("served path: largest probability, mean over rows"),
    "entropy": Signal("served path: entropy of the probabilities over ln(classes), mean over rows"),
    "margin": Signal("served path: largest less second largest probability, mean over rows"),
    "diversity": Signal("served path: H(mean probabilities) / ln(classes)"),
    "label_divergence": Signal(
        "Jensen-Shannon divergence of the served classes' moving shares and those of clean data, 0 to 1", table=False
    ),
    "label_psi": Signal("population stability index of the same two", table=False),
    "accuracy_atc": Signal(
        "adapted model: accuracy without labels, by average thresholded confidence; of every few compared requests",
        table=False,
    ),
    "accuracy_pdd": Signal("adapted model: the same by prediction disagreement under dropout", table=False),
    "source_accuracy_atc": Signal("source path: the same by average thresholded confidence", table=False),
    "source_accuracy_pdd": Signal("source path: the same by prediction disagreement under dropout", table=False),
    "estimator_disagreement": Signal("adapted model: how far the two estimates are apart", table=False),
    "benefit": Signal(
        "estimated accuracy of the adapted model less that of the source, over the stream's newest rows", table=False
    ),
    "update_norm": Signal("norm of a step's change of the adapted weights over the source weights' norm", table=False),
    "parameter_distance": Signal("norm of all change since the source over the source weights' norm", table=False),
}
"""Every signal of the server's own. A policy's own (``loss``, ``selected``, ...) come beside them, as it names them."""


@dataclass(frozen=True)
class Scores:
    """A path's answers: ``logits [N, C]``."""

    logits: Floats

    @cached_property
    def probabilities(self) -> Floats:
        """``[N, C]``."""
        return np.exp(self.logits - self._log_total)

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """``[N]``, the likeliest."""
        likeliest: NDArray[np.int64] = self.logits.argmax(1)
        return likeliest

    @property
    def energy(self) -> Floats:
        """``[N]``, nats: ``E = -logsumexp(z)``."""
        return -self._log_total[:, 0]

    @property
    def entropy(self) -> Floats:
        """``[N]``, over ``ln C``."""
        nats: Floats = -(self.probabilities * (self.logits - self._log_total)).sum(1)
        return nats / _log_classes(self.logits)

    @cached_property
    def _log_total(self) -> Floats:
        most = self.logits.max(1, keepdims=True)
        total: Floats = most + np.log(np.exp(self.logits - most).sum(1, keepdims=True))
        return total


@dataclass(frozen=True)
class Requests:
    """How ``N`` rows fall into ``S`` requests."""

    sizes: NDArray[np.int64]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """``[S]``."""
        return np.cumsum(self.sizes) - self.sizes

    def sum(self, rows: Floats) -> Floats:
        """``[N, ...] -> [S, ...]``."""
        total: Floats = np.add.reduceat(rows, self.starts, axis=0)
        return total

    def mean(self, rows: Floats) -> Floats:
        """``[N, ...] -> [S, ...]``."""
        return self.sum(rows) / self.sizes.reshape(-1, *[1] * (rows.ndim - 1))

    def shares(self, classes: NDArray[np.int64], count: int) -> Floats:
        """``classes [N]`` -> the share of each of ``count`` classes, ``[S, C]``."""
        places = np.repeat(np.arange(len(self.sizes)), self.sizes) * count + classes
        counts = np.bincount(places, minlength=len(self.sizes) * count).reshape(-1, count)
        return counts / self.sizes[:, None]


@dataclass(frozen=True)
class LayerStatistics:
    """Stored statistics of the batch-norm layers a pass went through, side by side: ``[channels of all layers]``."""

    mean: Floats
    var: Floats
    eps: Floats
    starts: NDArray[np.int64]
    """Where each layer begins."""


@dataclass(frozen=True)
class ClassFeatures:
    """Of clean data's features, by the class the source predicts: ``mean`` and mean square ``second``, ``[C, D]``."""

    mean: Floats
    second: Floats


def of_served(served: Scores, confidence: Floats, margin: Floats, requests: Requests) -> Values:
    """The served path's signals."""
    together = requests.mean(served.probabilities)
    return {
        "confidence": requests.mean(confidence),
        "entropy": requests.mean(served.entropy),
        "margin": requests.mean(margin),
        "diversity": entropy(together) / _log_classes(together),
    }


def of_source(source: Scores, features: Floats, clean: ClassFeatures | None, requests: Requests) -> Values:
    """The source path's signals but the batch-norm distances."""
    together = requests.mean(source.probabilities)
    measured = {
        "source_entropy": requests.mean(source.entropy),
        "source_energy": requests.mean(source.energy),
        "label_skew": 1 - entropy(together) / _log_classes(together),
    }
    if clean is not None:
        measured["feature_distance"] = feature_distance(features, source.classes, clean, requests)
    return measured


def of_both(served: Scores, source: Scores, requests: Requests) -> Values:
    """What comes of comparing the two paths on the same rows."""
    return {
        "agreement": requests.mean((served.classes == source.classes).astype(np.float64)),
        "skew_damage": divergence(requests.mean(served.probabilities), requests.mean(source.probabilities)),
    }


def feature_distance(features: Floats, classes: NDArray[np.int64], clean: ClassFeatures, requests: Requests) -> Floats:
    """Diagonal Frechet distance of a request's features to clean ones of the same mixture of classes, ``[S]``.

    ``F = |m - M|^2 + |sqrt v - sqrt V|^2``, where ``m, v`` are mean and biased variance of the request's features and
    ``M = sum_c q_c mu_c``, ``V = sum_c q_c s_c - M^2`` those of clean features in the request's own shares ``q`` of
    predicted ``classes [N]``. So it is no matter that a request holds one class only, which moves the plain distance
    (``q`` of clean data) as far as corruption does.
    """
    features = features.astype(np.float64)
    mean = requests.mean(features)
    var = np.maximum(requests.mean(np.square(features)) - np.square(mean), 0)
    expected = requests.mean(clean.mean[classes])
    expected_var = np.maximum(requests.mean(clean.second[classes]) - np.square(expected), 0)
    distance: Floats = (np.square(mean - expected) + np.square(np.sqrt(var) - np.sqrt(expected_var))).sum(1)
    return distance


def bn_distances(mean: Floats, var: Floats, source: LayerStatistics) -> Values:
    """Distances of each request's batch-norm statistics, ``[S, channels]`` each, to the stored ones.

    Of a layer ``mean_c [(m - M)^2 + (sqrt v - sqrt V)^2] / (V + eps)``, dimensionless: the normalised squared
    2-Wasserstein distance. ``eps`` is the layer's own, so that a channel without variance in the source does not count
    for more than the layer makes of it.
    """
    squared = np.square(mean - source.mean) + np.square(np.sqrt(var) - np.sqrt(source.var))
    channels = np.diff([*source.starts, mean.shape[1]])
    layers = np.add.reduceat(squared / (source.var + source.eps), source.starts, axis=1) / channels
    thirds = [
        third.mean(1) if third.size else np.full(len(mean), np.nan) for third in np.array_split(layers, 3, axis=1)
    ]
    return {
        "bn_distance": layers.mean(1),
        "bn_distance_max": layers.max(1),
        "bn_distance_early": thirds[0],
        "bn_distance_middle": thirds[1],
        "bn_distance_late": thirds[2],
    }


def entropy(shares: Floats) -> Floats:
    """``H = -sum p ln p`` over the last axis, nats."""
    total: Floats = -(shares * np.log(np.maximum(shares, 1e-12))).sum(-1)
    return total


def divergence(one: Floats, other: Floats) -> Floats:
    """Jensen-Shannon divergence over ``ln 2``, so from 0 to 1, over the last axis."""
    gap = entropy((one + other) / 2) - (entropy(one) + entropy(other)) / 2
    bits: Floats = np.maximum(gap, 0) / np.log(2)
    return bits


def stability_index(now: Floats, before: Floats) -> Floats:
    """Population stability index ``sum (q - p) ln(q / p)`` over the last axis, shares below 1e-4 taken as that."""
    now, before = np.maximum(now, 1e-4), np.maximum(before, 1e-4)
    index: Floats = ((now - before) * np.log(now / before)).sum(-1)
    return index


def _log_classes(scores: Floats) -> float:
    return float(np.log(max(scores.shape[-1], 2)))
