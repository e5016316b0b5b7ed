"""Sets of classes instead of one, and whether to abstain: split conformal prediction and its online form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tta_server.errors import BadInput

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Conformal:
    """Split conformal prediction (Vovk et al. 2005; score of Sadinle, Lei and Wasserman 2019): the set of a row has the
    classes of score ``1 - p`` at most the ``k``-th smallest among ``1 - p_y`` of ``n`` calibration rows,
    ``k = ceil((n + 1)(1 - alpha))``.

    A row's class is in its set with probability at least ``1 - alpha``, if the row is exchangeable with the calibration
    rows and ``p`` comes of the same model. After a shift, or with an adapted model, neither is so, and nothing is
    promised: see :class:`Adaptive`. Read only; shared by streams.
    """

    def __init__(self, scores: ArrayLike) -> None:
        """``scores [n]``: ``1 - p_y`` of the calibration rows. Raises ``BadInput``."""
        self.scores: Floats = np.sort(np.asarray(scores, np.float64))
        """In ascending order: what is to be kept."""
        if self.scores.ndim != 1 or not np.all((self.scores >= 0) & (self.scores <= 1)):
            raise BadInput("conformal scores must be a list of numbers from 0 to 1")

    @classmethod
    def calibrated(cls, logits: ArrayLike, labels: ArrayLike) -> Conformal:
        """From the model's ``logits [n, C]`` and the ``labels [n]`` of clean rows it was not trained on."""
        values, classes = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
        if values.ndim != 2 or classes.shape != values.shape[:1]:
            raise BadInput(f"expected logits [n, C] and labels [n], got {list(values.shape)} and {list(classes.shape)}")
        exponentials = np.exp(values - values.max(1, keepdims=True))
        return cls(1 - exponentials[np.arange(len(classes)), classes] / exponentials.sum(1))

    def threshold(self, alpha: float) -> float:
        """The score up to which classes are in a set: infinity (all) below ``alpha = 1 / (n + 1)``, minus infinity
        (none) from ``alpha = 1`` on."""
        rows = len(self.scores)
        rank = rows + 1 - int(np.floor((rows + 1) * alpha))
        if rank > rows:
            return np.inf
        return float(self.scores[rank - 1]) if rank > 0 else -np.inf

    def sets(self, probabilities: NDArray[np.floating[Any]], alpha: float) -> Mask:
        """``[N, C]`` -> which classes are in each row's set, ``[N, C]``."""
        inside: Mask = 1 - probabilities.astype(np.float64) <= self.threshold(alpha)
        return inside


class Adaptive:
    """Adaptive conformal inference (Gibbs and Candès 2021) of one stream: with each label,

        alpha <- alpha + gamma (target - err),

    where ``err`` is 1 if the class was not in the set *that was served*. The sets that come next are made with
    ``alpha``; at 0 and below they hold all classes, at 1 and above none.

    With ``T`` labels, whatever the stream and the model do,

        |mean of err - target| <= (max(alpha_1, 1 - alpha_1) + (d + 1) gamma) / (gamma T),

    ``d`` being the most rows that were served, and would be labelled, but were not yet, when another's label came; 0 is
    the paper's case (proposition 4.1). Proof: the sum of the steps is ``alpha_{T+1} - alpha_1``, and ``alpha`` stays in
    ``[-(d + 1) gamma, 1 + (d + 1) gamma]``: once it is at 0 or below, sets that are served have no error, and the ``d``
    served before take it down by ``gamma`` each at most; likewise above. This is about labelled rows only, and about
    the long run: it does not say that a given set is right, and is met by sets that are now and then empty or full.
    """

    def __init__(self, target: float, gamma: float) -> None:
        """``target``: share of rows whose set may miss the class; ``gamma``: the step. Raises ``ValueError``."""
        if not (0 < target < 1 and gamma > 0):
            raise ValueError(f"target must be in (0, 1) and gamma above 0, got {target:g} and {gamma:g}")
        self.target, self.gamma = target, gamma
        self.alpha = target
        """For :meth:`Conformal.sets` of the next rows."""
        self.labels = 0
        self.missed = 0
        """Labelled rows whose set did not hold the class."""

    def learn(self, sets: Mask, labels: NDArray[np.integer[Any]]) -> None:
        """``sets [N, C]`` as they were served, ``labels [N]`` of these rows."""
        missed = int(np.count_nonzero(~sets[np.arange(len(labels)), labels]))
        self.labels += len(labels)
        self.missed += missed
        self.alpha += self.gamma * (self.target * len(labels) - missed)

    @property
    def coverage(self) -> float | None:
        """Share of labelled rows whose set held the class."""
        return 1 - self.missed / self.labels if self.labels else None


def abstains(sets: Mask) -> Mask:
    """``[N, C]`` -> whether the row's set is anything but a single class, ``[N]``."""
    unsure: Mask = sets.sum(1) != 1
    return unsure


@dataclass(frozen=True)
class Sets:
    """Prediction sets of an answer, ``inside [N, C]``."""

    inside: NDArray[np.bool_]
    alpha: float
    """They are made for missing at most this share of the rows' classes, on rows like the calibration's."""

    @property
    def nbytes(self) -> int:
        """Of the mask."""
        return self.inside.nbytes

    @property
    def abstains(self) -> NDArray[np.bool_]:
        """Rows whose set is not exactly one class, ``[N]``."""
        return abstains(self.inside)
