"""What the guards of all streams do, and what labels say of the answers; read when Prometheus asks.

Of models, never of single streams. The estimates beside them are in ``scrape.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tta_server.metrics.scrape import Levels, buckets
from tta_server.trust.guarantees import Audit
from tta_server.trust.guard import Evidence, State
from tta_server.trust.labels import DELAYS, LabelTally
from tta_server.types import Stream

SHARE = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
POWER = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0)
UNGUARDED = "unguarded"
"""Of a stream that adapts with its guard disabled."""
REASONS = {"UnknownName": "unknown", "BadInput": "unfit", "Conflict": "conflict"}
"""Why labels are refused, by the error."""


class Budgets:
    """What was left of the streams' budgets at their last requests.

    A guarantee is for one thread, and reckons when it is asked: so it is asked by the thread that takes the steps.
    """

    def __init__(self) -> None:
        self._left: dict[Stream, float] = {}

    def note(self, streams: Iterable[Stream]) -> None:
        """These had a request just now."""
        for stream in streams:
            if stream.guarded is not None and stream.guarded.guarantee is not None:
                left = stream.guarded.guarantee.remaining
                if left is not None:
                    self._left[stream] = left

    def left(self, stream: Stream) -> float | None:
        """Of a stream; ``None`` where there is no budget, or was no request yet."""
        return self._left.get(stream)

    def keep(self, streams: Iterable[Stream]) -> None:
        """Forgets all others."""
        for gone in set(self._left).difference(streams):
            self._left.pop(gone, None)


@dataclass
class _Guards:
    """Of one model's streams, an entry each where there is one."""

    states: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    against: list[float] = field(default_factory=list)


class GuardsCollector(Collector):
    """The guards as they stand now."""

    def __init__(self, levels: Callable[[], Levels], budgets: Budgets) -> None:
        self._levels, self._budgets = levels, budgets

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        found = self._look(self._levels().streams)
        states = GaugeMetricFamily(
            "tta_guard_streams",
            "Open streams by the state of their guard; off: they do not adapt; unguarded: they do, with no guard.",
            labels=["model_name", "state"],
        )
        evidence = GaugeMetricFamily(
            "tta_guard_evidence_streams",
            "Guarded streams that adapt, by what their guard knows of the adapted model.",
            labels=["model_name", "evidence"],
        )
        left = HistogramMetricFamily(
            "tta_streams_budget_remaining_ratio",
            "Share of the streams' budgets (guarantees budget and ledger) that was left at their last request; streams "
            "now, so not to be rated.",
            labels=["model_name"],
        )
        against = HistogramMetricFamily(
            "tta_streams_regret_evidence_log10",
            "Evidence of harm by the streams' audits, as a power of 10: the statistic whose alarm is at guarantee.c; "
            "streams with answered audits now, so not to be rated.",
            labels=["model_name"],
        )
        for model, guards in found.items():
            counts = Counter(guards.states)
            for state in (*State, UNGUARDED):
                states.add_metric([model, state], counts[state])
            counts = Counter(guards.evidence)
            for one in Evidence:
                evidence.add_metric([model, one], counts[one])
            left.add_metric([model], *buckets(np.array(guards.left), SHARE))
            against.add_metric([model], *buckets(np.array(guards.against), POWER))
        yield from (states, evidence, left, against)

    def _look(self, streams: list[Stream]) -> dict[str, _Guards]:
        self._budgets.keep(streams)
        found: dict[str, _Guards] = {}
        for stream in streams:
            own = found.get(stream.model)
            if own is None:
                own = found[stream.model] = _Guards()
            guard = stream.guarded
            if not stream.adapt or stream.policy.plain:
                own.states.append(State.OFF)
            elif guard is None:
                own.states.append(UNGUARDED)
            else:
                own.states.append(guard.state)
                own.evidence.append(guard.evidence)
                left = self._budgets.left(stream)
                if left is not None:
                    own.left.append(left)
                if isinstance(guard.guarantee, Audit):
                    against = guard.guarantee.evidence
                    if against > 0:  # an audit was answered
                        own.against.append(math.log10(against))
        return found


class LabelsCollector(Collector):
    """What clients said of answers, summed over the tenants."""

    def __init__(self, levels: Callable[[], Levels]) -> None:
        self._levels = levels

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        levels = self._levels()
        told = {model: LabelTally() for model in levels.digests}
        refused = dict.fromkeys(REASONS.values(), 0)
        audits = dict.fromkeys(("issued", "answered", "expired"), 0)
        for status in levels.labels:
            for model, tally in status.tallies.items():
                _add(told.setdefault(model, LabelTally()), tally)
            for error, count in status.rejected.items():
                reason = REASONS.get(error, "other")
                refused[reason] = refused.get(reason, 0) + count
            for result in audits:
                audits[result] += getattr(status.audits, result)
        yield from _labels(told)
        rejected = CounterMetricFamily(
            "tta_labels_rejected",
            "Postings of labels that were refused: the request is unknown or not kept any more; unfit for it; in "
            "conflict with labels that came before.",
            labels=["reason"],
        )
        for reason, count in refused.items():
            rejected.add_metric([reason], count)
        asked = CounterMetricFamily(
            "tta_audits",
            "Labels that audits asked for: issued in all; answered; expired, as their prediction is not kept any more.",
            labels=["result"],
        )
        for result, count in audits.items():
            asked.add_metric([result], count)
        yield from (rejected, asked)


def _add(total: LabelTally, tally: LabelTally) -> None:
    for who, counts in tally.right.items():
        total.right[who] = [before + count for before, count in zip(total.right[who], counts, strict=True)]
    total.delays = [before + count for before, count in zip(total.delays, tally.delays, strict=True)]
    total.delay_seconds += tally.delay_seconds


def _labels(told: dict[str, LabelTally]) -> Iterable[Metric]:
    """Of each model."""
    predictions = CounterMetricFamily(
        "tta_labelled_predictions",
        "Labelled samples by whether a predictor was right: served (all), adapted and source (where they ran).",
        labels=["model_name", "predictor", "outcome"],
    )
    delays = HistogramMetricFamily(
        "tta_label_delay_seconds", "From an answer to the posting of its labels.", labels=["model_name"]
    )
    for model, tally in told.items():
        for who, (wrong, right) in tally.right.items():
            predictions.add_metric([model, who, "correct"], right)
            predictions.add_metric([model, who, "incorrect"], wrong)
        bounds = [*(str(bound) for bound in DELAYS), "+Inf"]
        counts = np.cumsum(tally.delays).astype(float).tolist()
        delays.add_metric([model], list(zip(bounds, counts, strict=True)), tally.delay_seconds)
    yield from (predictions, delays)
