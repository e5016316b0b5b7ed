"""Streams made of clean labelled images, damaged and put together in ways known to help or to harm adaptation.

What comes of normalising by such a stream's own statistics, against the source, is what the judge of the benefit
(``drift/benefit.py``) learns from, and what a report card (``report_card.py``) shows of each policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.base import BATCH_NORM, Segments
from tta_server.corruptions import CORRUPTIONS
from tta_server.drift.benefit import REFEREE, Judge, compare, figures, fit
from tta_server.drift.signals import Floats, Scores
from tta_server.engine.norm import Pass
from tta_server.engine.source import SourceModel
from tta_server.settings import InputSettings

Rows = NDArray[np.int64]

CLEAN = "clean"
SEVERITIES = (0.4, 1.0)
SIZES = {16: 4, 64: 2, 200: 2}
"""Rows of a request, and how many of that size are drawn of each kind of stream."""
MIXTURES = {"all": 2, "one": 1, "two": 1, "five": 1, "dirichlet": 1}
"""Which classes a request holds, and how often each is drawn: all as in the data, one, two, five, or in shares from a
Dirichlet distribution of concentration 0.1."""


class Damage(NamedTuple):
    """What a stream suffers: a corruption by name, or :data:`CLEAN`."""

    name: str
    severity: float

    def apply(self, x: Tensor, spec: InputSettings, generator: torch.Generator) -> Tensor:
        """``x [N, ...]`` in the range of the inputs, corrupted."""
        if self.name == CLEAN:
            return x
        low, high = spec.range or (0.0, 1.0)
        damaged = CORRUPTIONS[self.name]((x - low) / (high - low), self.severity, generator)
        return damaged * (high - low) + low


COMMON = 2.0
"""So many times as much a request of all classes counts: half of all, then."""
DAMAGES = [Damage(CLEAN, 0.0)] * 2 + [Damage(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
REQUESTS = len(DAMAGES) * sum(MIXTURES.values()) * sum(SIZES.values())


def draw(mixture: str, labels: Rows, count: int, generator: np.random.Generator) -> Rows:
    """``count`` rows of such a mixture of the ``labels [N]``; again and again where there are not enough."""
    present = np.unique(labels)
    if mixture == "all":
        return generator.choice(len(labels), count, replace=count > len(labels))
    if mixture == "dirichlet":
        shares = generator.dirichlet(np.full(len(present), 0.1))
        chosen = generator.choice(present, count, p=shares)
    else:
        some = generator.choice(present, min({"one": 1, "two": 2, "five": 5}[mixture], len(present)), replace=False)
        chosen = generator.choice(some, count)
    rows = np.empty(count, np.int64)
    for one in np.unique(chosen):
        places = np.flatnonzero(chosen == one)
        own = np.flatnonzero(labels == one)
        rows[places] = generator.choice(own, len(places), replace=len(places) > len(own))
    return rows


def why_not(model: SourceModel) -> str:
    """Why no judge can be made for a model; empty where one can."""
    if len(model.settings.input.shape) != 3:
        return f"damages images [channels, height, width], and the inputs are {list(model.settings.input.shape)}"
    if not model.network.keeps_statistics:
        return "judges batch statistics, and this model has no batch norms that keep any"
    return ""


def judge(model: SourceModel, x: Tensor, labels: Rows, seed: int) -> Iterator[Judge | None]:
    """Fits the judge to requests drawn from ``x [N, ...]`` with their ``labels``: ``None`` after each of
    :data:`REQUESTS`, then it."""
    numpy, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    seen, gained, weights = [], [], []
    for damage in DAMAGES:
        for mixture, repeats in MIXTURES.items():
            for size, draws in SIZES.items():
                for _ in range(repeats * draws):
                    rows = draw(mixture, labels, size, numpy)
                    found, gain = _look(model, damage.apply(x[rows], model.settings.input, random), labels[rows])
                    if np.isfinite(found).all():
                        seen.append(found)
                        gained.append(gain)
                        weights.append(size * (COMMON if mixture == "all" else 1.0))
                    yield None
    yield fit(np.array(seen), np.array(gained), np.array(weights))


def _look(model: SourceModel, x: Tensor, labels: Rows) -> tuple[Floats, float]:
    """The figures of one request, and how much more is right by its own statistics than by the source's."""
    segments = Segments([len(x)], model.network.device)
    with torch.no_grad():
        source, own, referee = (
            Scores(model.network.run(one, x).logits.float().cpu().numpy())
            for one in (Pass(segments), Pass(segments, {}, BATCH_NORM), Pass(segments, {}, REFEREE))
        )
    compared = compare(own, np.array([len(x)]), source, referee.classes, np.arange(len(x)))
    gain = float((own.classes == labels).mean() - (source.classes == labels).mean())
    return figures(compared.own, compared.source, compared.counts)[0], gain
