"""Change detectors over z-scores: one object watches one signal of many streams, each in a row of its own.

A detector's ``update(rows, z)`` takes the next value of each of these streams and says who raised an alarm *now*. Any
class with this method, ``grow`` and ``clear`` can stand in their place.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tta_server.drift.signals import Floats

Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]

LARGEST = 6.0
"""Values count as no more than this: one outlier alone is no alarm."""
LEAST_SPREAD = 0.1
"""Deviation of a stream's own z-scores, so that one that sent the same over and over does not alarm at a speck of
dust."""


class Detector(Protocol):
    """What the monitor asks of a detector."""

    def grow(self, streams: int) -> None:
        """Has rows for so many streams from now on."""

    def clear(self, row: int) -> None:
        """Starts a stream afresh."""

    def update(self, rows: Rows, z: Floats) -> Flags:
        """Takes in ``z [S]``, the next values of the streams in ``rows [S]``, all different; says whose alarm began."""


class Departure:
    """Has the stream departed from its source? A one-sided CUSUM (Page 1954) against the fixed reference of clean data,

        S <- min(h, max(0, S + z - k)),

    where ``z`` has mean 0 and variance 1 on clean data. The alarm begins when ``S`` reaches ``h``, and ends by itself
    when ``S`` is down to ``h / 2``: the ceiling lets a stream come back as quickly as it left. With normal ``z``, the
    mean number of values to a false alarm is about ``(e^(2kb) - 2kb - 1) / (2k^2)``, ``b = h + 1.166`` (Siegmund 1985).
    """

    def __init__(self, slack: float, threshold: float) -> None:
        """``slack``: k, half the shift that is to be found soonest, in standard deviations. ``threshold``: h."""
        self._slack, self._threshold = slack, threshold
        self.level: Floats = np.zeros(0)
        """``S`` by stream."""
        self.on: Flags = np.zeros(0, np.bool_)
        """Whose alarm lasts."""

    def grow(self, streams: int) -> None:
        """See :class:`Detector`."""
        self.level, self.on = _longer(self.level, streams), _longer(self.on, streams)

    def clear(self, row: int) -> None:
        """See :class:`Detector`."""
        self.level[row], self.on[row] = 0.0, False

    def update(self, rows: Rows, z: Floats) -> Flags:
        """See :class:`Detector`."""
        moved = self.level[rows] + np.clip(z, -LARGEST, LARGEST) - self._slack
        level = self.level[rows] = np.clip(moved, 0.0, self._threshold)
        was = self.on[rows]
        on = self.on[rows] = level >= np.where(was, self._threshold / 2, self._threshold)
        began: Flags = on & ~was
        return began


class Change:
    """Is the stream changing now? A two-sided CUSUM against the stream's own recent past,

        S+ <- max(0, S+ + r - k),   S- <- max(0, S- - r - k),   r = (z - m) / s,

    with ``m`` and ``s`` moving mean and deviation of the stream, ``s`` no less than ``LEAST_SPREAD``. It needs no clean
    data. An alarm, when one of the two reaches ``h``, starts everything afresh: what comes next is compared with the
    new state of affairs. The first values are only learned from.
    """

    def __init__(self, slack: float, threshold: float, half_life: float, learn: int) -> None:
        """``half_life`` of the moving averages, in values; ``learn``: so many first values are not judged."""
        self._slack, self._threshold, self._learn = slack, threshold, learn
        self._share = 1 - 0.5 ** (1 / half_life)
        nothing: Floats = np.zeros(0)
        self._count, self._mean, self._var, self._up, self._down = (nothing.copy() for _ in range(5))

    def grow(self, streams: int) -> None:
        """See :class:`Detector`."""
        self._count, self._mean, self._var = (_longer(one, streams) for one in (self._count, self._mean, self._var))
        self._up, self._down = _longer(self._up, streams), _longer(self._down, streams)

    def clear(self, row: int) -> None:
        """See :class:`Detector`."""
        for one in (self._count, self._mean, self._var, self._up, self._down):
            one[row] = 0.0

    def update(self, rows: Rows, z: Floats) -> Flags:
        """See :class:`Detector`."""
        count, mean, var = self._count[rows], self._mean[rows], self._var[rows]
        gap = z - mean
        judged = count >= self._learn
        # The mean is known to var / count only, which adds to the spread of what is compared with it.
        spread = np.sqrt(np.maximum(var, LEAST_SPREAD**2) * (1 + 1 / np.maximum(count, 1)))
        residual = np.where(judged, np.clip(gap / spread, -LARGEST, LARGEST), 0.0)
        up = np.maximum(0.0, self._up[rows] + residual - self._slack)
        down = np.maximum(0.0, self._down[rows] - residual - self._slack)
        alarm: Flags = np.maximum(up, down) >= self._threshold
        share = np.maximum(1 / (count + 1), self._share)
        kept = ~alarm
        self._count[rows] = (count + 1) * kept
        self._mean[rows] = (mean + share * gap) * kept
        self._var[rows] = ((1 - share) * (var + share * np.square(gap))) * kept
        self._up[rows], self._down[rows] = up * kept, down * kept
        return alarm


def _longer(values: NDArray[Any], streams: int) -> NDArray[Any]:
    """A copy with zeros behind."""
    longer = np.zeros(streams, values.dtype)
    longer[: len(values)] = values
    return longer
