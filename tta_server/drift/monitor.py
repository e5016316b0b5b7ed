"""What is known of each stream: moving averages of its signals, its drift score, its verdict, its recent past.

Every signal keeps an exponential moving average, corrected for its start: after ``n`` values with keep factor
``m = 2^(-1 / half_life)``,

    average = sum_i (1 - m) m^(n - i) s_i / (1 - m^n),

and so does its z-score (``reference.py``). The *drift score* is the average z-score of ``feature_distance``: by how
many standard deviations the stream's requests are farther from clean data than clean requests of their size are. The
*verdict* says it in words, see :class:`Verdict`.

All streams lie in the rows of common arrays, so that a step updates all of its streams at once, and the distribution
over ten thousand of them takes milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tta_server.drift.detectors import Change, Departure, Detector
from tta_server.drift.reference import Reference
from tta_server.drift.signals import AGREEMENT, DISTANCE, DRIFT, SIGNALS, Floats, Values, divergence, stability_index
from tta_server.types import Stream

SLACK, THRESHOLD = 0.4, 12.0
"""Of the departure detectors, beyond what the reference allows. Chosen by ``benchmarks/detectors.py``."""
CHANGE_SLACK, CHANGE_THRESHOLD = 0.75, 10.0
LEARN = 10
CHANGE_HALF_LIFE = 50.0
LASTS = 8
"""For how many measured requests after a change a stream is called changing."""
LEAST = 3
"""Measured requests before a stream may be called near its source."""
HISTORY = 90
"""Points kept of each stream's recent past."""
HISTORY_SECONDS = 2.0
"""Least time from one to the next."""
REMEMBERED = (DRIFT, "confidence", AGREEMENT)
"""What the recent past is kept of: drift as its z-score, or, without a reference, as the batch-norm distance."""
WATCHED = (DRIFT, DISTANCE)
"""Signals with detectors."""
LEVELS = ("label_divergence", "label_psi", "parameter_distance", "benefit")
"""Signals that speak of all that was so far, and are not averaged again."""


class Verdict(StrEnum):
    """A stream in words."""

    UNKNOWN = "unknown"
    """Too little was measured, or there is nothing to compare it with."""
    NEAR = "near source"
    DRIFTED = "drifted"
    """The departure detector's alarm on ``feature_distance`` lasts."""
    CHANGING = "changing"
    """A change detector's alarm was just now."""


@dataclass(frozen=True)
class Detection:
    """An alarm. ``kind``: ``departure``, or ``change``."""

    stream: Stream
    signal: str
    kind: str
    drift: float | None
    """The stream's drift score then."""


class Reading(NamedTuple):
    """A signal of a stream now."""

    value: float
    """Moving average."""
    z: float | None
    """Moving average of its z-score; ``None`` where there is nothing to compare with."""
    band: tuple[float, float] | None
    """Where clean requests as large as the stream's last mostly lie: mean +- 2 standard deviations."""


class Monitor:
    """The signals of all streams. Written by the device thread; reads from elsewhere see whole values."""

    def __init__(self, half_life: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``half_life`` of the averages, in measured requests; ``clock`` in seconds, for the recent past."""
        self._keep, self._clock = 0.5 ** (1.0 / half_life), clock
        self._rows: dict[Stream, int] = {}
        self._free: list[int] = []
        self._columns = {name: column for column, name in enumerate(SIGNALS)}
        nothing: Floats = np.zeros((0, len(SIGNALS)))
        # An average not yet measured is NaN. Readers look at these only, each of whose values changes at once.
        self._average, self._weight, self._z, self._z_weight = (nothing.copy() for _ in range(4))
        self._share = np.array([1.0 if name in LEVELS else 1 - self._keep for name in SIGNALS])
        """By signal, the weight of a new value in its average."""
        none: NDArray[np.int64] = np.zeros(0, np.int64)
        self._size, self._measured, self._since_change = none.copy(), none.copy(), none.copy()
        self._departures = {name: Departure(SLACK, THRESHOLD) for name in WATCHED}
        self._changes = {name: Change(CHANGE_SLACK, CHANGE_THRESHOLD, CHANGE_HALF_LIFE, LEARN) for name in WATCHED}
        self._labels: dict[Stream, tuple[Floats, float]] = {}
        """Moving shares of the served classes, ``[C]``, and their weight."""
        self._references: dict[Stream, Reference | None] = {}
        self._past: NDArray[Any] = np.zeros((0, len(REMEMBERED), HISTORY), np.float32)
        self._past_at, self._past_count = np.zeros(0), none.copy()

    # Written by the device thread

    def update(
        self,
        streams: Sequence[Stream],
        sizes: NDArray[np.int64],
        values: Mapping[str, Floats],
        reference: Reference | None,
        shares: Floats | None = None,
    ) -> list[Detection]:
        """Takes in one request of each of these streams (all different): ``values``, ``[S]`` each, NaN or infinite
        where not measured; their rows ``sizes [S]``; ``shares [S, C]`` of the served classes. Returns the alarms."""
        if not streams:
            return []
        rows = np.array([self._row(stream) for stream in streams])
        for stream, row in zip(streams, rows.tolist(), strict=True):
            if self._references.setdefault(stream, reference) is not reference:
                self._begin_again(row)
                self._references[stream] = reference
        values = {**values, **self._update_labels(streams, shares, reference)}
        for name in values.keys() - self._columns.keys():
            self._add_column(name)
        zscores = {} if reference is None else reference.zscores(dict(values), sizes)
        columns = np.array([self._columns[name] for name in values])
        table = np.stack(list(values.values()), axis=1)
        scored = np.stack([zscores.get(name, np.full(len(rows), np.nan)) for name in values], axis=1)
        place = np.ix_(rows, columns)
        self._average[place], self._weight[place] = _blend(
            self._average[place], self._weight[place], table, self._share[columns]
        )
        self._z[place], self._z_weight[place] = _blend(
            self._z[place], self._z_weight[place], scored, self._share[columns]
        )
        self._size[rows] = sizes
        found = self._detect(streams, rows, sizes, values, zscores, reference)
        self._remember(rows)
        return found

    def forget(self, stream: Stream) -> None:
        """Drops everything known of a stream."""
        row = self._rows.pop(stream, None)
        self._labels.pop(stream, None)
        self._references.pop(stream, None)
        if row is not None:
            self._average[row], self._weight[row] = np.nan, 0.0
            self._size[row] = self._measured[row] = self._past_count[row] = 0
            self._since_change[row] = LASTS
            self._past_at[row] = -np.inf
            self._begin_again(row)
            self._free.append(row)

    # Read from anywhere

    def read(self, stream: Stream) -> dict[str, float]:
        """The stream's averages by signal; a signal never measured is absent."""
        row = self._rows.get(stream)
        if row is None:
            return {}
        averages = zip(list(self._columns), self._average[row].tolist(), strict=False)
        return {name: average for name, average in averages if average == average}

    def readings(self, stream: Stream) -> dict[str, Reading]:
        """The same, each beside what clean data have."""
        row, reference = self._rows.get(stream), self._references.get(stream)
        if row is None:
            return {}
        size = int(self._size[row])
        bands = reference.bands(size) if reference is not None and size else {}
        found = {}
        for name, value in self.read(stream).items():
            z = float(self._z[row, self._columns[name]])
            found[name] = Reading(value, z if z == z else None, bands.get(name))
        return found

    def drift(self, stream: Stream) -> float | None:
        """The stream's drift score; ``None`` before it was measured, or without a reference."""
        return self._single(stream, DRIFT, True)

    def agreement(self, stream: Stream) -> float | None:
        """Share of rows so far on which served and source class agree; ``None`` before it was measured."""
        return self._single(stream, AGREEMENT, False)

    def verdict(self, stream: Stream) -> Verdict:
        """The stream in words."""
        return self.survey([stream]).verdicts()[0]

    def points(self, stream: Stream) -> int:
        """How many points its past has had: another number, another past."""
        row = self._rows.get(stream)
        return 0 if row is None else int(self._past_count[row])

    def past(self, stream: Stream) -> dict[str, list[float | None]]:
        """Of ``REMEMBERED``, the stream's recent past, oldest first; ``None`` where not yet measured."""
        row = self._rows.get(stream)
        if row is None:
            return {name: [] for name in REMEMBERED}
        count, past = int(self._past_count[row]), self._past[row]
        order = np.arange(max(0, count - HISTORY), count) % HISTORY
        return {
            name: [None if value != value else round(value, 4) for value in past[index, order].tolist()]
            for index, name in enumerate(REMEMBERED)
        }

    def survey(self, streams: Sequence[Stream]) -> Survey:
        """All of these streams at once."""
        return Survey(self, np.array([self._rows.get(stream, -1) for stream in streams], np.int64))

    def averages(self, rows: NDArray[np.int64], name: str, scored: bool) -> Floats:
        """A signal's averages, or those of its z-scores, in these rows; NaN where there are none."""
        column = self._columns.get(name)
        if column is None:
            return np.full(len(rows), np.nan)
        averages: Floats = (self._z if scored else self._average)[rows, column]
        return averages

    def states(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Who is changing, who has departed, and of whom enough is known, in these rows."""
        known = (self._measured[rows] >= LEAST) & ~np.isnan(self._z[rows, self._columns[DRIFT]])
        return self._since_change[rows] < LASTS, self._departures[DRIFT].on[rows], known

    # How

    def _single(self, stream: Stream, name: str, scored: bool) -> float | None:
        row = self._rows.get(stream)
        if row is None:
            return None
        average = float((self._z if scored else self._average)[row, self._columns[name]])
        return average if average == average else None

    def _update_labels(
        self, streams: Sequence[Stream], shares: Floats | None, reference: Reference | None
    ) -> dict[str, Floats]:
        """Moves the streams' class shares on, where they are not NaN; how far they are now from clean data's."""
        if shares is None or reference is None:
            return {}
        moved = []
        for stream, own in zip(streams, shares, strict=True):
            average, weight = self._labels.get(stream, (own, 0.0))
            if np.isfinite(own[0]):
                weight = self._keep * weight + 1 - self._keep
                average = average + (1 - self._keep) / weight * (own - average)
                self._labels[stream] = average, weight
            moved.append(average)
        now = np.stack(moved)
        return {
            "label_divergence": divergence(now, reference.predicted),
            "label_psi": stability_index(now, reference.predicted),
        }

    def _detect(
        self,
        streams: Sequence[Stream],
        rows: NDArray[np.int64],
        sizes: NDArray[np.int64],
        values: Mapping[str, Floats],
        zscores: Values,
        reference: Reference | None,
    ) -> list[Detection]:
        found = []
        for name in WATCHED:
            if name not in values:
                continue
            # Without a reference, logarithms of the value itself will do to see a change.
            scores = zscores.get(name, np.log(np.maximum(values[name], 1e-12)))
            there = np.isfinite(scores)
            scores, own = scores[there], rows[there]
            alarms = [("change", self._changes[name].update(own, scores))]
            if reference is not None and name in zscores:
                excess = scores - reference.allowance(name, sizes[there])
                alarms.append(("departure", self._departures[name].update(own, excess)))
            if name == DRIFT or DRIFT not in values:
                self._measured[own] += 1
                self._since_change[own] += 1
                self._since_change[own[alarms[0][1]]] = 0
            for kind, began in alarms:
                alarmed = [streams[index] for index in np.flatnonzero(there)[began].tolist()]
                found += [Detection(stream, name, kind, self.drift(stream)) for stream in alarmed]
        return found

    def _remember(self, rows: NDArray[np.int64]) -> None:
        now = self._clock()
        due = rows[now - self._past_at[rows] >= HISTORY_SECONDS]
        if not len(due):
            return
        z = self._z[due, self._columns[DRIFT]]
        columns = np.array([self._columns[name] for name in (DISTANCE, *REMEMBERED[1:])])
        averages = self._average[np.ix_(due, columns)]
        place = self._past_count[due] % HISTORY
        self._past[due, 0, place] = np.where(np.isnan(z), averages[:, 0], z)
        self._past[due, 1, place], self._past[due, 2, place] = averages[:, 1], averages[:, 2]
        self._past_at[due] = now
        self._past_count[due] += 1

    def _begin_again(self, row: int) -> None:
        """Forgets what a stream was compared with."""
        self._z[row], self._z_weight[row] = np.nan, 0.0
        for detector in self._detectors():
            detector.clear(row)

    def _detectors(self) -> list[Detector]:
        return [*self._departures.values(), *self._changes.values()]

    def _row(self, stream: Stream) -> int:
        row = self._rows.get(stream)
        if row is None:
            if not self._free:
                self._grow()
            row = self._rows[stream] = self._free.pop()
        return row

    def _grow(self) -> None:
        before = len(self._size)
        streams = max(16, 2 * before)

        def longer(values: NDArray[Any], fill: float = 0) -> NDArray[Any]:
            grown = np.full((streams, *values.shape[1:]), fill, values.dtype)
            grown[:before] = values
            return grown

        self._average, self._z = longer(self._average, np.nan), longer(self._z, np.nan)
        self._weight, self._z_weight = longer(self._weight), longer(self._z_weight)
        self._size, self._measured = longer(self._size), longer(self._measured)
        self._since_change = longer(self._since_change, LASTS)
        self._past, self._past_count = longer(self._past), longer(self._past_count)
        self._past_at = longer(self._past_at, -np.inf)
        for detector in self._detectors():
            detector.grow(streams)
        self._free = list(range(streams - 1, before - 1, -1))

    def _add_column(self, name: str) -> None:
        def wider(values: Floats, fill: float = 0.0) -> Floats:
            widened: Floats = np.concatenate([values, np.full((len(values), 1), fill)], axis=1)
            return widened

        self._average, self._z = wider(self._average, np.nan), wider(self._z, np.nan)
        self._weight, self._z_weight = wider(self._weight), wider(self._z_weight)
        self._share = np.append(self._share, 1 - self._keep)
        self._columns[name] = len(self._columns)


class Survey:
    """Many streams at once, each at its place; NaN and ``unknown`` for those of which nothing is known."""

    def __init__(self, monitor: Monitor, rows: NDArray[np.int64]) -> None:
        self._monitor, self._there, self._rows = monitor, rows >= 0, rows[rows >= 0]

    def values(self, name: str, scored: bool = False) -> Floats:
        """A signal's moving averages, or those of its z-scores, ``[streams]``."""
        values = np.full(len(self._there), np.nan)
        values[self._there] = self._monitor.averages(self._rows, name, scored)
        return values

    def verdicts(self) -> list[Verdict]:
        """``[streams]``."""
        places = np.zeros(len(self._there), np.int64)
        changing, departed, known = self._monitor.states(self._rows)
        places[self._there] = np.select([changing, departed, known], [3, 2, 1])
        order = (Verdict.UNKNOWN, Verdict.NEAR, Verdict.DRIFTED, Verdict.CHANGING)
        return [order[place] for place in places.tolist()]


def _blend(average: Floats, weight: Floats, values: Floats, share: Floats) -> tuple[Floats, Floats]:
    """Moves averages ``[S, M]`` and their weights on by the ``values`` that are finite, each with its ``share``."""
    finite = np.isfinite(values)
    moved = np.where(finite, (1 - share) * weight + share, weight)
    before = np.where(weight > 0, average, 0.0)
    step = share * (np.where(finite, values, 0.0) - before) / np.where(finite, moved, 1.0)
    return np.where(finite, before + step, average), moved
