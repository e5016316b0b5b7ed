"""The memory of RoTTA: which rows of a stream are worth keeping ("category-balanced sampling with timeliness and
uncertainty", CSTU, Yuan et al., CVPR 2023, arXiv 2303.13899).

Plain Python, one stream at a time: rows are offered one by one, and what becomes of each depends on those before.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass


@dataclass
class Memory:
    """The items of one stream, but for their images. Changes with every offer.

    Of the ``capacity`` places, ``N``, each of ``classes`` classes, ``C``, has a quota of ``N / C``, a real number. The
    item of the highest score is the least worth,

        S = lambda_t / (1 + exp(-age / N)) + lambda_u U / ln C.

    ``labels`` (-1: empty), ``uncertainty`` (``U``) and ``age`` (in offers since its own) are by place, ``N`` of each.
    """

    capacity: int
    classes: int
    lambda_t: float
    lambda_u: float
    labels: list[int]
    uncertainty: list[float]
    age: list[int]

    def offer(self, label: int, uncertainty: float) -> int | None:
        """Offers a row, whatever comes of it one more to the ages: the place it takes, or ``None`` if it takes none.

        Below its quota it is taken in if there is room, else it competes with the classes of most items; at its quota
        with its own class. Its rival is the item of highest ``S`` there, of equal ones the later, and keeps its place
        unless that is strictly higher than the row's ``S``.
        """
        place = self._place_for(label, uncertainty)
        if place is not None:
            self.labels[place], self.uncertainty[place], self.age[place] = label, uncertainty, 0
        for one in self.places():
            self.age[one] += 1
        return place

    def places(self) -> list[int]:
        """Those with an item."""
        return [place for place, label in enumerate(self.labels) if label >= 0]

    def weights(self) -> list[float]:
        """``w = e^(-a) / (1 + e^(-a))`` with ``a = age / N`` for each item, in ``[0, 0.5]``."""
        decayed = [math.exp(-self.age[place] / self.capacity) for place in self.places()]
        return [one / (1 + one) for one in decayed]

    def _place_for(self, label: int, uncertainty: float) -> int | None:
        places = self.places()
        population = Counter(self.labels[place] for place in places)
        contested = {label}
        if population[label] < self.capacity / self.classes:
            if len(places) < self.capacity:
                return self.labels.index(-1)
            most = max(population.values())
            contested = {one for one, count in population.items() if count == most}
        # No two items have the same age, so the later of equals is the younger.
        rivals = [place for place in places if self.labels[place] in contested]
        rival = max(rivals, key=lambda place: (self._score_at(place), -self.age[place]))
        return rival if self._score_at(rival) > self._score(0, uncertainty) else None

    def _score_at(self, place: int) -> float:
        return self._score(self.age[place], self.uncertainty[place])

    def _score(self, age: int, uncertainty: float) -> float:
        timeliness = 1 / (1 + math.exp(-age / self.capacity))
        return self.lambda_t * timeliness + self.lambda_u * uncertainty / math.log(self.classes)
