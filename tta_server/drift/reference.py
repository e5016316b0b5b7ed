"""What clean data look like to the monitor: a model's artefact group ``monitoring``, made by ``tta-server prepare``.

A signal of a request depends on how many rows it has: statistics of few rows are noisy, and so far from the source's.
Therefore the group holds a table per signal: mean and standard deviation over random clean requests of 1, 2, 4, ...
rows. With them every signal is told as

    z = (s - mean(B)) / sd(B),

for distances after taking logarithms (they are positive and skewed; so ``z`` is near normal from one row on), and
between two sizes of the table interpolated in ``ln B``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tta_server.drift.signals import (
    SIGNALS,
    ClassFeatures,
    Floats,
    LayerStatistics,
    Requests,
    Scores,
    Values,
    bn_distances,
    of_served,
    of_source,
)

GROUP = "monitoring"
LEAST_ROWS = 200
"""Of clean data."""
MOST = 1024
"""Rows of the largest request that there is a table for, clean data permitting."""
DRAWS = 200
"""Random requests per size."""
TOLERATED = 0.05
"""A stream whose distances exceed clean ones by less than this share of a single clean row's has not departed."""
TABLED = tuple(name for name, signal in SIGNALS.items() if signal.table)


@dataclass(frozen=True)
class CleanRows:
    """Clean data as the source model sees them, by row: ``logits [n, C]``, ``features [n, D]``, and, for each
    batch-norm layer side by side, mean and variance of its inputs, ``[n, channels]``."""

    logits: Floats
    features: Floats
    means: Floats
    vars: Floats


@dataclass(frozen=True)
class Reference:
    """The group's content. ``mean`` and ``sd`` are ``[tabled signals, sizes]``."""

    features: ClassFeatures
    predicted: Floats
    """Share of each class among the source's predictions, ``[C]``."""
    sizes: NDArray[np.int64]
    mean: Floats
    sd: Floats

    def tensors(self) -> dict[str, Floats]:
        """As arrays by name, for the artefact file; a signal is one of ``TABLED``, so their names are part of it."""
        tables = {f"table.{name}": np.stack([self.mean[row], self.sd[row]]) for row, name in enumerate(TABLED)}
        return {
            "class_mean": self.features.mean,
            "class_second": self.features.second,
            "predicted": self.predicted,
            "sizes": self.sizes,
            **tables,
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Floats]) -> Reference:
        """The inverse. A signal that the file's maker did not know is not compared."""
        sizes = tensors["sizes"].astype(np.int64)
        unknown = np.full((2, len(sizes)), np.nan)
        tables = np.stack([tensors.get(f"table.{name}", unknown) for name in TABLED]).astype(np.float64)
        return cls(
            ClassFeatures(tensors["class_mean"].astype(np.float64), tensors["class_second"].astype(np.float64)),
            tensors["predicted"].astype(np.float64),
            sizes,
            tables[:, 0],
            tables[:, 1],
        )

    def zscores(self, values: Values, sizes: NDArray[np.int64]) -> Values:
        """``z`` of each signal that clean data say something of, ``[S]`` each, for requests of so many rows."""
        mean, sd = self._expected(sizes)
        scored: Values = {}
        for name, row in self._known.items():
            if name in values:
                value = _scale(name, values[name])
                scored[name] = (value - mean[row]) / sd[row]
        return scored

    def allowance(self, name: str, sizes: NDArray[np.int64]) -> Floats:
        """The z-score ``[S]`` that clean requests of so many rows would have if their distance ``name`` were larger by
        what is ``TOLERATED``: ``ln(1 + TOLERATED e^(mean(1) - mean(B))) / sd(B)``.

        The larger a request, the less noise is in its distance, and the larger the z-score of what is always there: few
        classes, a little less light. Without an allowance for that, large requests would depart over nothing.
        """
        row = TABLED.index(name)
        allowed = np.log1p(TOLERATED * np.exp(self.mean[row, 0] - self.mean[row])) / self.sd[row]
        between: Floats = np.interp(np.log(sizes), np.log(self.sizes), allowed)
        return between

    @cached_property
    def _known(self) -> dict[str, int]:
        """Rows of the tables, by signal; what an older file does not know is absent."""
        return {name: row for row, name in enumerate(TABLED) if np.isfinite(self.mean[row]).all()}

    def bands(self, size: int) -> dict[str, tuple[float, float]]:
        """Between which values the signals of clean requests of so many rows mostly lie: mean +- 2 sd."""
        mean, sd = (one[:, 0] for one in self._expected(np.array([size])))
        ends = zip(TABLED, (mean - 2 * sd).tolist(), (mean + 2 * sd).tolist(), strict=True)
        return {
            name: (math.exp(low), math.exp(high)) if SIGNALS[name].log else (low, high)
            for name, low, high in ends
            if low == low
        }

    def _expected(self, sizes: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the tabled signals for each request: ``[signals, S]``."""
        logs = np.log(self.sizes)
        place = np.interp(np.log(sizes), logs, np.arange(len(logs)))
        low = np.minimum(place.astype(np.int64), len(logs) - 2) if len(logs) > 1 else np.zeros(len(sizes), np.int64)
        high = np.minimum(low + 1, len(logs) - 1)
        share = place - low
        return (
            self.mean[:, low] * (1 - share) + self.mean[:, high] * share,
            self.sd[:, low] * (1 - share) + self.sd[:, high] * share,
        )


def make_reference(rows: CleanRows, layers: LayerStatistics | None, seed: int) -> Reference:
    """The reference of clean rows in random order, at least ``LEAST_ROWS``.

    The classes' features come from one half of the rows and the tables from the other, so that the tables contain the
    error with which the former are known. Without batch-norm ``layers`` their signals are left out.
    """
    half = len(rows.logits) // 2
    everything = Scores(rows.logits)
    features = _class_features(rows.features[:half], everything.classes[:half], rows.logits.shape[1])
    generator = np.random.default_rng(seed)
    # No requests larger than half of what is drawn from: they would be too much alike.
    sizes = [2**power for power in range(11) if 2**power <= min(MOST, max(1, half // 2))]
    mean, sd = (np.full((len(TABLED), len(sizes)), np.nan) for _ in range(2))
    for column, size in enumerate(sizes):
        drawn = [
            _measure(rows, generator.integers(half, len(rows.logits), size), features, layers) for _ in range(DRAWS)
        ]
        for row, name in enumerate(TABLED):
            if name in drawn[0]:
                values = _scale(name, np.concatenate([one[name] for one in drawn]))
                # Of a single row some signals are constant: how many classes it has, say.
                mean[row, column], sd[row, column] = values.mean(), max(values.std(ddof=1), 1e-6)
    predicted = Requests(np.array([len(rows.logits)])).shares(everything.classes, rows.logits.shape[1])[0]
    return Reference(features, predicted, np.array(sizes), mean, sd)


def _measure(
    rows: CleanRows, chosen: NDArray[np.int64], clean: ClassFeatures, layers: LayerStatistics | None
) -> Values:
    """All tabled signals of the one request that the chosen rows make, as the source would answer it."""
    scores, request = Scores(rows.logits[chosen]), Requests(np.array([len(chosen)]))
    ranked = np.sort(scores.probabilities, axis=1)
    second = ranked[:, -2] if ranked.shape[1] > 1 else np.zeros(len(ranked))
    values = of_served(scores, ranked[:, -1], ranked[:, -1] - second, request)
    values |= of_source(scores, rows.features[chosen], clean, request)
    if layers is not None:
        means = rows.means[chosen]
        mean = means.mean(0, dtype=np.float64)
        var = rows.vars[chosen].mean(0, dtype=np.float64) + np.square(means - mean).mean(0)
        values |= bn_distances(mean[None], var[None], layers)
    return values


def _class_features(features: Floats, classes: NDArray[np.int64], count: int) -> ClassFeatures:
    """By predicted class; a class that is never predicted gets what all features have together."""
    features = features.astype(np.float64)
    mean = np.repeat(features.mean(0)[None], count, 0)
    second = np.repeat(np.square(features).mean(0)[None], count, 0)
    for one in np.unique(classes):
        own = features[classes == one]
        mean[one], second[one] = own.mean(0), np.square(own).mean(0)
    return ClassFeatures(mean, second)


def _scale(name: str, values: Floats) -> Floats:
    """As compared: a distance's logarithm, anything else as it is."""
    return np.log(np.maximum(values, 1e-12)) if SIGNALS[name].log else values
