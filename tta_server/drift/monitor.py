"""Moving averages of each stream's signals, and the drift score made of them.

Signals come with the steps that measured them (``bn_distance`` and ``agreement`` only with shadowed ones). Each keeps
an exponential moving average, corrected for its start: after ``n`` values with keep factor ``m = 2^(-1 / half_life)``,

    average = sum_i (1 - m) m^(n - i) s_i / (1 - m^n).

The *drift score* is the average of ``bn_distance``: the normalised squared 2-Wasserstein distance between the batch
statistics at the source model's batch-norm layers and the stored ones, mean over channels and layers. 0 is the source's
own data seen in large batches; small batches raise it by sampling noise alone, so compare streams of like batch size.
"""

from __future__ import annotations

from collections.abc import Mapping

from tta_server.types import Stream


class Monitor:
    """The signals of all streams. Written by the device thread; reads from elsewhere see whole values."""

    def __init__(self, half_life: float) -> None:
        self._keep = 0.5 ** (1.0 / half_life)
        # Per stream and signal: (average without correction, weight so far = 1 - m^n).
        self._averages: dict[Stream, dict[str, tuple[float, float]]] = {}

    def update(self, stream: Stream, signals: Mapping[str, float]) -> None:
        """Takes one request's signals of a stream into its averages."""
        averages = self._averages.setdefault(stream, {})
        for name, value in signals.items():
            average, weight = averages.get(name, (0.0, 0.0))
            averages[name] = (
                self._keep * average + (1 - self._keep) * value,
                self._keep * weight + (1 - self._keep),
            )

    def read(self, stream: Stream) -> dict[str, float]:
        """The stream's averages by signal; a signal never measured is absent."""
        return {name: average / weight for name, (average, weight) in list(self._averages.get(stream, {}).items())}

    def forget(self, stream: Stream) -> None:
        """Drops everything known of a stream."""
        self._averages.pop(stream, None)
