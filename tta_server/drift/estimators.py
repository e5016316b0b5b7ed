"""How often a predictor is right, without labels: two estimates per request, both fitted on clean labelled rows alone.

*ATC*, average thresholded confidence (Garg et al., ICLR 2022, arXiv 2201.04234): the share of rows whose score
``-H(softmax(z / T))`` exceeds the threshold that on clean rows leaves a share equal to the accuracy. ``T`` minimises
the negative log likelihood of clean rows (Guo et al., ICML 2017).

*PDD*, prediction disagreement under dropout, with the correction of AETTA (Lee et al., CVPR 2024, arXiv 2404.01351):
``e``, the share of answers that ``PASSES`` dropout passes change, stands for the error:

    accuracy = 1 - e / d^3 + offset,      d = ln c / ln c0 at most 1,      kept within [1/C, 1]

``d`` is the diversity of the predictions: a model that has collapsed to few classes is sure of itself, dropout or not.
``c`` is the collision probability of the request's predictions, the mean of ``<p_i, p_j>`` over its pairs of rows, as
if it had ``PAIRS`` more pairs that are like clean ones, of which it is ``c0``. In the paper ``d = H(mean p) / ln C``.
By that a request of few rows looks collapsed, whatever it holds: on clean CIFAR-10, at 8 rows, it takes 0.17 off.

There the dropout is after each stage of a network. Here it is on what enters the classifier head: the passes are one
small product, no network runs again, and any model with a linear head will do. The masks are the same for all rows and
requests. The rate is the one under which, on clean rows, as many answers stay as are right.

A frozen source gets no correction (``adapted=False``): no adaptation makes it collapse, and where it predicts few
classes its requests may hold few.

The clean rows should be of images that the model was not trained on. Of those that it was it is surer and more often
right than of any others, and everything is estimated too high. A model that is sure and wrong is so in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tta_server.drift.signals import Floats, Requests, Scores

GROUP = "estimates"
LEAST_ROWS = 200
"""Of clean data."""
FEW_WRONG = 20
"""Threshold and rate rest on clean rows that the model gets wrong; with fewer than these they are hardly known."""
PASSES = 10
"""Of dropout."""
ROWS = 64
"""Of the requests that offset and spread are taken of."""
DRAWS = 100
"""Random clean requests for these."""
PAIRS = 64.0
"""As how many pairs of rows clean data count in a request's diversity."""
STEPS = 10
"""Halvings of the interval in which the dropout rate is looked for."""
SHARPNESS = (1 / 32, 8.0)
"""Between which ``1 / T`` is looked for."""
TOLERATED = 1e-3
"""By how much, of the largest logit, a linear head's may differ from the model's."""
BLOCK = 256
"""Clean rows that go through dropout at a time."""


@dataclass(frozen=True)
class Head:
    """A linear classifier head, ``logits = features W^T + b``: ``weight [C, D]`` and ``bias [C]``, or one for each
    request, ``[S, C, D]`` and ``[S, C]``."""

    weight: Floats
    bias: Floats | None = None

    def scores(self, features: Floats, requests: Requests) -> Floats:
        """``features [N, K, D]`` -> ``[N, K, C]``."""
        if self.weight.ndim == 2:
            return self._of(features, self.weight, self.bias)
        biases = [None] * len(self.weight) if self.bias is None else self.bias
        parts = zip(np.split(features, requests.starts[1:]), self.weight, biases, strict=True)
        return np.concatenate([self._of(*part) for part in parts])

    @staticmethod
    def _of(features: Floats, weight: Floats, bias: Floats | None) -> Floats:
        scores: Floats = features.reshape(-1, features.shape[-1]) @ weight.T
        if bias is not None:
            scores += bias
        return scores.reshape(*features.shape[:-1], -1)


class Estimate(NamedTuple):
    """Estimated accuracies of requests, ``[S]`` each; NaN where there is none."""

    atc: Floats
    pdd: Floats

    @property
    def disagreement(self) -> Floats:
        """``|atc - pdd|``: by how much at least one of the two is off, in part."""
        gap: Floats = np.abs(self.atc - self.pdd)
        return gap


@dataclass(frozen=True)
class Estimates:
    """What clean labelled rows say: the content of a model's artefact group ``estimates``.

    ``spread``: standard deviation of estimate less truth over clean requests of ``ROWS`` rows, for ATC, PDD and
    corrected PDD. It is the noise of few rows; what drift adds nobody knows without labels.
    """

    temperature: float
    threshold: float
    accuracy: float
    rows: int
    wrong: int
    """Of the ``rows``."""
    collision: float
    spread: tuple[float, float, float]
    rate: float = 0.0
    offsets: tuple[float, float] = (0.0, 0.0)
    """Without and with the correction."""
    masks: NDArray[np.bool_] | None = None
    """``[K, D]``, what each dropout pass keeps; without a linear head there are none, and no PDD."""

    @property
    def remarks(self) -> list[str]:
        """What is wanting, in words."""
        said = []
        if self.masks is None:
            said.append("the classifier head is not linear, so there is one estimate (ATC) and no second opinion (PDD)")
        if self.wrong < FEW_WRONG:
            said.append(
                f"of {self.rows:,} clean images the model gets {self.wrong} wrong, too few to learn from; give images "
                "that it was not trained on, and enough of them"
            )
        return said

    def tensors(self) -> dict[str, NDArray[Any]]:
        """As arrays by name, for the artefact file."""
        values: dict[str, NDArray[Any]] = {name: np.asarray(getattr(self, name), np.float64) for name in _VALUES}
        return values if self.masks is None else values | {"masks": self.masks.astype(np.uint8)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Estimates:
        """The inverse."""
        values: dict[str, Any] = {name: tensors[name].tolist() for name in _VALUES}
        values |= {name: tuple(values[name]) for name in ("spread", "offsets")}
        values |= {name: int(values[name]) for name in ("rows", "wrong")}
        masks = tensors.get("masks")
        return cls(**values, masks=None if masks is None else masks.astype(np.bool_))

    def estimate(
        self, logits: Floats, features: Floats, head: Head | None, requests: Requests, adapted: bool
    ) -> Estimate:
        """The accuracy of each request's answers ``argmax logits [N, C]``, of one pass whose ``features [N, D]``
        entered the ``head``. ``adapted``: whether by adapted weights, or by the frozen source."""
        kept, probabilities = self.kept(logits, features, head, requests), Scores(logits).probabilities
        return Estimate(requests.mean(self.sure(logits)), self.corrected(kept, probabilities, requests, adapted))

    def band(self, rows: float) -> tuple[float, float, float]:
        """The ``spread`` of requests of so many rows, or of as many rows of several: it goes as ``1 / sqrt(rows)``."""
        atc, plain, corrected = (one * (ROWS / rows) ** 0.5 for one in self.spread)
        return atc, plain, corrected

    def sure(self, logits: Floats) -> Floats:
        """``[N]``: 1 for a row over the threshold, else 0; NaN for one whose scores are not finite."""
        certainty = _certainty(logits, self.temperature)
        return np.where(np.isfinite(certainty), certainty > self.threshold, np.nan)

    def kept(self, logits: Floats, features: Floats, head: Head | None, requests: Requests) -> Floats:
        """``[N]``: the share of dropout passes with the row's own answer; NaN where scores are not finite."""
        if head is None or self._factors is None:
            return np.full(len(logits), np.nan)
        dropped = features.astype(np.float32, copy=False)[:, None] * self._factors
        scores = head.scores(dropped, requests)
        same = (scores.argmax(2) == logits.argmax(1)[:, None]).mean(1)
        return np.where(np.isfinite(logits).all(1) & np.isfinite(scores).all((1, 2)), same, np.nan)

    def corrected(self, kept: Floats, probabilities: Floats, requests: Requests, adapted: bool) -> Floats:
        """PDD of requests, ``[S]``, of their rows' shares ``kept [N]`` and ``probabilities [N, C]``."""
        error = 1 - requests.mean(kept)
        if adapted:
            error = error / self._diversity(probabilities, requests) ** 3
        accuracy: Floats = 1 - error + self.offsets[adapted]
        return np.clip(accuracy, 1 / probabilities.shape[1], 1)

    def _diversity(self, probabilities: Floats, requests: Requests) -> Floats:
        """``d`` of each request, above 0 and at most 1."""
        total = (_collisions(probabilities, requests) + PAIRS * self.collision) / (_pairs(requests) + PAIRS)
        ratio: Floats = np.log(total) / min(np.log(self.collision), -1e-3)
        return np.clip(ratio, 1e-3, 1)

    @cached_property
    def _factors(self) -> Floats | None:
        """``[K, D]``, by which dropout multiplies features: 0, or ``1 / (1 - rate)``."""
        return None if self.masks is None else (self.masks / (1 - self.rate)).astype(np.float32)


_VALUES = ("temperature", "threshold", "accuracy", "rows", "wrong", "collision", "spread", "rate", "offsets")


def make_estimates(
    logits: Floats, features: Floats, labels: NDArray[np.int64], head: Head | None, seed: int = 0
) -> Estimates:
    """Fits both on clean rows: ``logits [n, C]``, ``features [n, D]``, ``labels [n]``.

    For threshold and rate the accuracy counts as ``(right + 1) / (n + 2)``, so that there are some where no row is
    wrong. Where the ``head`` does not make the logits of the features, or is ``None``, there is ATC alone.
    Raises ``ValueError`` with fewer than ``LEAST_ROWS`` rows, or scores that are not finite.
    """
    if len(logits) < LEAST_ROWS:
        raise ValueError(f"estimates of accuracy need at least {LEAST_ROWS} clean rows, got {len(logits)}")
    if not (np.isfinite(logits).all() and np.isfinite(features).all()):
        raise ValueError("the scores or features of some clean rows are not finite")
    right = logits.argmax(1) == labels
    target = (right.sum() + 1) / (len(right) + 2)
    temperature = _temperature(logits, labels)
    everything = Requests(np.array([len(logits)]))
    probabilities = Scores(logits.astype(np.float64)).probabilities
    made = Estimates(
        temperature,
        _threshold(_certainty(logits, temperature), target),
        float(right.mean()),
        len(right),
        int((~right).sum()),
        float((_collisions(probabilities, everything) / _pairs(everything))[0]),
        (0.0, 0.0, 0.0),
    )
    generator = np.random.default_rng(seed)
    kept = np.full(len(logits), np.nan)
    if head is not None and _makes(head, features, logits):
        made, kept = _with_dropout(made, logits, features, head, target, generator)
    drawn = generator.integers(0, len(logits), DRAWS * ROWS)
    requests = Requests(np.full(DRAWS, ROWS))
    truth = requests.mean(right[drawn].astype(np.float64))
    found = [made.corrected(kept[drawn], probabilities[drawn], requests, adapted) for adapted in (False, True)]
    gaps = [(one - truth) for one in (requests.mean(made.sure(logits)[drawn]), *found)]
    offsets = (0.0, 0.0) if made.masks is None else (-float(gaps[1].mean()), -float(gaps[2].mean()))
    spread = (float(gaps[0].std()), float(gaps[1].std()), float(gaps[2].std()))
    return replace(made, spread=spread, offsets=offsets)


def _with_dropout(
    made: Estimates, logits: Floats, features: Floats, head: Head, target: float, generator: np.random.Generator
) -> tuple[Estimates, Floats]:
    """With the dropout whose passes leave the share ``target`` of the answers, and what each row keeps then."""
    uniform = generator.random((PASSES, features.shape[1]))
    count = -(-len(logits) // BLOCK)
    blocks = list(zip(np.array_split(logits, count), np.array_split(features, count), strict=True))
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        rate = (low + high) / 2
        made = replace(made, rate=rate, masks=uniform >= rate)
        kept = np.concatenate([made.kept(*block, head, Requests(np.array([len(block[0])]))) for block in blocks])
        low, high = (rate, high) if kept.mean() > target else (low, rate)
    return made, kept


def _makes(head: Head, features: Floats, logits: Floats) -> bool:
    """Whether the logits are what this head makes of the features."""
    if head.weight.shape != (logits.shape[1], features.shape[1]):
        return False
    made = head.scores(features[:, None], Requests(np.array([len(features)])))[:, 0]
    return bool(np.abs(made - logits).max() <= TOLERATED * np.abs(logits).max())


def _certainty(logits: Floats, temperature: float) -> Floats:
    """``-H(softmax(z / T))``, ``[N]``, over ``ln C``."""
    certainty: Floats = -Scores(logits.astype(np.float64) / temperature).entropy
    return certainty


def _temperature(logits: Floats, labels: NDArray[np.int64]) -> float:
    """Of the least negative log likelihood: a golden-section search over ``1 / T``, in which it is convex."""
    scores = logits.astype(np.float64)
    own = np.take_along_axis(scores, labels[:, None], 1)[:, 0]

    def loss(sharpness: float) -> float:
        return float((-sharpness * own - Scores(sharpness * scores).energy).mean())

    low, high = SHARPNESS
    section = (5**0.5 - 1) / 2
    for _ in range(30):
        left, right = high - section * (high - low), low + section * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return 2 / (low + high)


def _threshold(certainty: Floats, share: float) -> float:
    """Midway between two rows, such that this ``share`` of them is over it."""
    ranked = np.sort(certainty)
    under = round((1 - share) * len(ranked))
    return float(ranked[under - 1 : under + 1].mean())


def _pairs(requests: Requests) -> Floats:
    """Ordered pairs of two rows, of each request."""
    return (requests.sizes * (requests.sizes - 1)).astype(np.float64)


def _collisions(probabilities: Floats, requests: Requests) -> Floats:
    """Sum of ``<p_i, p_j>`` over these, ``[S]``."""
    squares = np.square(requests.sizes[:, None] * requests.mean(probabilities)).sum(1)
    total: Floats = squares - requests.sizes * requests.mean(np.square(probabilities).sum(1))
    return np.maximum(total, 0)
