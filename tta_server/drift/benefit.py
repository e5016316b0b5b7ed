"""Is a stream better off adapted? An estimate without labels, from what the two models say of the same rows.

Of a stream's newest rows, about ``ROWS`` (a request of so many stands for itself), it looks at the mean probabilities
``m`` of the source (``s``) and of the policy's own network (``a``), before the policy makes anything of its scores,
and takes eleven figures; ``H`` is the entropy over ``ln C``. The *referee* is the source normalised half way, by
``REFEREE`` of the request's own batch statistics:

====================  ==================================================================================
``margin``            ``mean_i 1[differs] (max p_a - max p_s)``: what going by the policy's network would gain if
                      both knew how sure they may be
``differs``           share of rows whose two classes differ
``information_*``     ``H(m) - mean_i H(p_i)``: how many different things are said, and how surely
``entropy_*``         ``mean_i H(p_i)``
``divergence``        Jensen-Shannon divergence of ``m_a`` and ``m_s``
``concentration_*``   ``ln(C sum_c m_c^2)``, 0 for classes in equal shares
``agrees_*``          share of rows with the referee's class: where a request holds few classes, it is the policy's
                      network that goes its own way
====================  ==================================================================================

The estimate of ``accuracy(adapted) - accuracy(source)`` is linear in them. Its weights are fitted once, by
``tta-server prepare``, to streams made of the model's own clean labelled data, damaged and put together in ways known
to help or to harm adaptation (``damage.py``); real streams and their labels have no part in it. It is an estimate, and
guarantees nothing: unlabelled data cannot say for certain which of two models is right (Ben-David et al. 2010).

Without prepared weights a rule of thumb stands in for them: :data:`UNPREPARED`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapters.base import Norm
from tta_server.drift.signals import Floats, Requests, Scores, divergence, entropy

GROUP = "benefit"
"""Of the artefacts."""
ROWS = 64
"""Before a request of ``n`` rows, all that was summed so far is taken times ``max(0, 1 - n / ROWS)``."""
FIGURES = (
    "margin", "differs", "information_adapted", "information_source", "entropy_adapted", "entropy_source",
    "divergence", "concentration_adapted", "concentration_source", "agrees_adapted", "agrees_source",
)  # fmt: skip
RIDGE = 0.1
"""Of the standardised figures' weights."""
REFEREE = Norm(0.3)
COUNTS = 8


Rows = NDArray[np.int64]


class Compared(NamedTuple):
    """What a step's rows say, request by request: sums over its rows. ``own``, ``source``: of probabilities, each
    ``[S, C]``; ``counts [S, 8]``: rows, their entropy; rows that were compared, their entropy under the source, margin,
    how many differ, and how many the referee takes for what the policy's network and the source do."""

    own: Floats
    source: Floats
    counts: Floats


def compare(own: Scores, sizes: Rows, source: Scores, referee: Rows, asked: Rows) -> Compared:
    """``own [N, C]``: scores of the policy's network; ``sizes [S]`` of the requests; ``source [M, C]``: the source's
    scores, and ``referee [M]``: the referee's classes, of the rows ``asked [M]``, in order."""
    differs = own.classes[asked] != source.classes
    gain = own.probabilities[asked].max(1) - source.probabilities.max(1, initial=0.0)
    requests, everyone = len(sizes), Requests(sizes)
    owner = np.repeat(np.arange(requests), sizes)[asked]
    parts = np.bincount(owner, minlength=requests)
    of_source = np.zeros((requests, own.probabilities.shape[1]))
    if len(asked):
        some = parts > 0
        of_source[some] = Requests(parts[some]).sum(source.probabilities)
    columns = (source.entropy, gain * differs, differs, own.classes[asked] == referee, source.classes == referee)
    counts = [sizes, everyone.sum(own.entropy), parts, *(np.bincount(owner, one, requests) for one in columns)]
    return Compared(everyone.sum(own.probabilities), of_source, np.stack(counts, axis=1))


class Evidence:
    """Sums over the newest rows of a model's streams, a row of a common table each."""

    def __init__(self, classes: int) -> None:
        self._places: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._table = np.zeros((0, 2 * classes + COUNTS), np.float32)
        self._classes = classes

    def update(self, streams: Sequence[Hashable], compared: Compared) -> Floats:
        """Takes in a request of each stream; returns their :data:`FIGURES`, ``[S, 11]``, NaN where nothing was compared
        yet, and for a request with scores that are not finite, which is not taken in."""
        places = np.array([self._place(stream) for stream in streams])
        keep = np.maximum(0.0, 1 - compared.counts[:, :1] / ROWS)
        sums = self._table[places] * keep + np.concatenate(compared, axis=1)
        sound = np.isfinite(sums).all(1)
        self._table[places[sound]] = sums[sound]
        sums[~sound] = np.nan
        return figures(sums[:, : self._classes], sums[:, self._classes : -COUNTS], sums[:, -COUNTS:])

    def __len__(self) -> int:
        """Streams."""
        return len(self._places)

    def forget(self, stream: Hashable) -> None:
        """Starts a stream afresh."""
        place = self._places.pop(stream, None)
        if place is not None:
            self._table[place] = 0.0
            self._free.append(place)

    def _place(self, stream: Hashable) -> int:
        place = self._places.get(stream)
        if place is None:
            if not self._free:
                rows = len(self._table)
                self._free = list(range(max(64, 2 * rows) - 1, rows - 1, -1))
                self._table = np.concatenate(
                    [self._table, np.zeros((len(self._free), self._table.shape[1]), np.float32)]
                )
            place = self._places[stream] = self._free.pop()
        return place


def figures(own: Floats, source: Floats, counts: Floats) -> Floats:
    """:data:`FIGURES` of sums as in :class:`Compared`, ``[S, 11]``."""
    rows, compared = counts[:, :1], np.where(counts[:, 2:3] > 1e-6, counts[:, 2:3], np.nan)
    m_a, m_s = own / rows, source / compared
    classes = own.shape[1]
    log = math.log(max(classes, 2))
    e_a, e_s = counts[:, 1] / rows[:, 0], counts[:, 3] / compared[:, 0]
    columns = (
        counts[:, 4] / compared[:, 0],
        counts[:, 5] / compared[:, 0],
        entropy(m_a) / log - e_a,
        entropy(m_s) / log - e_s,
        e_a,
        e_s,
        divergence(m_a, m_s),
        np.log(classes * np.square(m_a).sum(1)),
        np.log(classes * np.square(m_s).sum(1)),
        counts[:, 6] / compared[:, 0],
        counts[:, 7] / compared[:, 0],
    )
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Judge:
    """Estimates the benefit: ``weights [11]`` of the figures and ``offset``; ``spread``: the standard deviation of what
    it was wrong by on the streams it was fitted to, larger than anything it learned from clean ones."""

    weights: Floats
    offset: float
    spread: float

    def benefit(self, figures: Floats) -> Floats:
        """``accuracy(adapted) - accuracy(source)`` of the streams' newest rows, as estimated, ``[S]``."""
        return np.clip(figures @ self.weights + self.offset, -1.0, 1.0)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """As artefacts."""
        return {"weights": self.weights, "offset": np.array(self.offset), "spread": np.array(self.spread)}

    @staticmethod
    def of_tensors(tensors: Mapping[str, NDArray[Any]]) -> Judge:
        """The same again; the rule of thumb where there is none, or one for other figures than ours."""
        if np.shape(tensors.get("weights", 0)) != (len(FIGURES),):
            return UNPREPARED
        return Judge(tensors["weights"], float(tensors["offset"]), float(tensors["spread"]))


UNPREPARED = Judge(np.array([1.0, 0.03, *[0.0] * 9]), 0.0999, float("nan"))
"""Where nothing was prepared: a gain of just 0.1 and more where the policy is less sure of its class than the source of
its own by no more than 0.03, over the rows on which they differ. A rule of thumb for networks like those of
``benchmarks/harm.py``, and no estimate of an accuracy."""


def fit(seen: Floats, benefit: Floats, weights: Floats) -> Judge:
    """Ridge regression of ``benefit [n]`` on the figures ``seen [n, 11]``, each with its own of ``weights [n]``.

    The constant is shrunk with the rest: of a stream that says nothing the estimate is near 0, which is not enough.
    """
    mean, sd = seen.mean(0), np.maximum(seen.std(0), 1e-9)
    scaled = np.column_stack([(seen - mean) / sd, np.ones(len(seen))])
    share = weights / weights.sum()
    weighed = scaled * share[:, None]
    solved = np.linalg.solve(scaled.T @ weighed + RIDGE * np.eye(scaled.shape[1]), weighed.T @ benefit)
    slopes = solved[:-1] / sd
    offset = float(solved[-1] - mean @ slopes)
    residual = benefit - (seen @ slopes + offset)
    return Judge(slopes, offset, float(np.sqrt(share @ np.square(residual))))
