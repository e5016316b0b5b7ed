"""Counts and distributions for Prometheus, in a registry of their own.

Label values are bounded: models, policies, routes, results, and of streams only the watched ones (``scrape.py``). Every
metric's help text says what it is and in which unit; ``docs/metrics.md`` says more.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter as Counted
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tta_server.drift.monitor import WATCHED, Monitor
from tta_server.drift.signals import AGREEMENT, DISTANCE
from tta_server.metrics.scrape import RATIO, Levels, LevelsCollector, StreamsCollector, WatchedCollector, Watchlist
from tta_server.metrics.state import StateCollector
from tta_server.metrics.trust import Budgets, GuardsCollector, LabelsCollector
from tta_server.trust.guard import Action, State
from tta_server.types import EVENTS, Call, Event, StepStats, Stream

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DISTANCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
RESULTS = ("applied", "rejected_nonfinite", "rejected_update", "rejected_distance", "failed", "vetoed", "shed")
OPERATIONS = ("write", "fetch", "prefetch")
CAUSES = ("crash", "damage")
MOVES = (
    ("canary", "benefit"), ("active", "benefit"), ("shadow", "benefit"), ("canary", "labels"), ("active", "labels"),
    ("shadow", "labels"), ("canary", "cool-down over"), ("shadow", "collapse"), ("shadow", "periodic"),
    ("shadow", "rejected steps"), ("shadow", "toggled"), ("frozen", "audit"), ("shadow", "audit"),
    ("quarantine", "audit"),
)  # fmt: skip
"""Of guards by themselves: where to, and by which rule."""
NORMS = (*(factor * 10.0**power for power in range(-6, 0) for factor in (1, 2, 5)), 1.0)


class PrometheusRecorder:
    """Keeps the metrics."""

    def __init__(self, levels: Callable[[], Levels], monitor: Monitor, watchlist: Watchlist) -> None:
        """``levels`` is called at every scrape."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for every one, which nothing here reads
        self._levels, self._monitor = levels, monitor
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        model = ["model_name"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(name, text, model + labels, registry=self._registry)

        def histogram(name: str, text: str, labels: list[str], buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, model + labels, buckets=buckets, registry=self._registry)

        def by_row(name: str, text: str, bounds: Sequence[float]) -> RowHistogram:
            made = RowHistogram(name, text, bounds)
            self._registry.register(made)
            return made

        self._requests = counter("tta_requests", "HTTP requests answered, by route and status code.", ["route", "code"])
        self._request_seconds = histogram(
            "tta_request_duration_seconds", "From the request's arrival to its last byte.", ["route"], SECONDS
        )
        self._queue_seconds = histogram(
            "tta_queue_duration_seconds", "Wait of a prediction request for its engine step.", [], SECONDS
        )
        self._compute_seconds = histogram(
            "tta_compute_duration_seconds",
            "An engine step's phases: forward up to the answers; adapt (loss, backward, optimiser, commit); "
            "source_shadow (the frozen model on sampled requests); monitor (signals and detectors).",
            ["phase"],
            SECONDS,
        )
        self._deferred_seconds = histogram(
            "tta_adaptation_deferred_seconds",
            "From an adapting step's answers to its commit, without its own work: requests of others were answered.",
            [],
            SECONDS,
        )
        self._stale = counter(
            "tta_stale_predictions", "Samples answered while steps on the stream's earlier requests were under way.", []
        )
        self._batch_rows = histogram("tta_batch_samples", "Samples in one engine step, of all its streams.", [], ROWS)
        self._predictions = counter(
            "tta_predictions",
            "Samples answered, by the policy that ran and by whose answer was served: adapted; source; mixed, where a "
            "request's rows got both.",
            ["policy", "served_by"],
        )
        self._steps = counter(
            "tta_adaptation_steps",
            "Adaptation steps of streams: applied; rejected_nonfinite (state or scores were not finite), "
            "rejected_update and rejected_distance (outside the trust region), failed (an error after the answer), "
            "vetoed (by the stream's guard): nothing kept; shed (under pressure, not taken).",
            ["policy", "result"],
        )
        self._samples = counter(
            "tta_adaptation_samples",
            "Samples that a policy which chooses among them adapted to (selected) or not (left_out).",
            ["policy", "decision"],
        )
        self._confidence = by_row(
            "tta_prediction_confidence_ratio", "Largest served probability of a sample, not calibrated.", RATIO
        )
        self._entropy = by_row(
            "tta_prediction_entropy_ratio", "Entropy of a sample's served probabilities over ln(classes).", RATIO
        )
        self._margin = by_row(
            "tta_prediction_margin_ratio", "A sample's largest less its second largest served probability.", RATIO
        )
        self._distance = by_row(
            "tta_bn_statistics_distance_ratio",
            "Of sampled requests: normalised squared 2-Wasserstein distance of the batch's statistics at the source's "
            "batch-norm layers to the stored ones, mean over channels and layers; 0 is source data in large batches.",
            DISTANCES,
        )
        self._agreement = by_row(
            "tta_source_agreement_ratio",
            "Of sampled requests: share of samples whose served class is the source model's.",
            RATIO,
        )
        self._update_norm = by_row(
            "tta_adaptation_update_norm_ratio",
            "Norm of an applied step's change of a stream's adapted weights over the norm of the source's.",
            NORMS,
        )
        self._detections = counter(
            "tta_drift_detections",
            "Alarms of the monitor: departure (from clean data), change (against the stream's own past); by signal.",
            ["signal", "kind"],
        )
        self._events = counter("tta_stream_events", "What happened to streams, see /v1/events.", ["kind"])
        self._state_seconds = Histogram(
            "tta_state_duration_seconds",
            "Of the store: write (a commit of many streams), fetch (a state that a step waits for), prefetch (ahead).",
            ["operation"],
            buckets=SECONDS,
            registry=self._registry,
        )
        for operation in OPERATIONS:
            self._state_seconds.labels(operation)
        self._lost = counter(
            "tta_state_lost_steps", "Changes that streams lost to a crash, or to damage of the store.", ["cause"]
        )
        self._lost_before = Gauge(
            "tta_state_recovery_lost_steps",
            "Changes that streams had lost to a crash when this process started, and that no answer had told of.",
            registry=self._registry,
        )
        self._moves = counter(
            "tta_guard_moves", "Changes of state of the streams' guards: where to, and by which rule.", ["to", "rule"]
        )
        self._rollbacks = counter(
            "tta_adaptation_rollbacks", "Streams that their guard took back to their last good state.", []
        )
        self._quarantines = counter(
            "tta_quarantines", "Streams that get the source's answers until an operator lets them go.", []
        )
        self._budgets = Budgets()
        self._errors = counter("tta_monitor_errors", "Engine steps that could not be measured; see the log.", [])
        for collector in (
            LevelsCollector(self._read),
            StateCollector(self._read),
            StreamsCollector(self._read, monitor),
            GuardsCollector(self._read, self._budgets),
            LabelsCollector(self._read),
            WatchedCollector(lambda: watchlist.choose(self._read().streams, monitor), monitor),
        ):
            self._registry.register(collector)

    def step(self, stats: StepStats) -> None:
        """See :class:`Recorder`."""
        model, policy = stats.lane.model, stats.lane.policy.name
        for phase, seconds in (
            ("forward", stats.forward_seconds),
            ("adapt", stats.adapt_seconds),
            ("source_shadow", stats.shadow_seconds),
            ("monitor", stats.monitor_seconds),
        ):
            if seconds:
                self._compute_seconds.labels(model, phase).observe(seconds)
        if stats.monitor_failed:
            self._errors.labels(model).inc()
        if not stats.jobs:
            return
        self._batch_rows.labels(model).observe(sum(job.rows for job in stats.jobs))
        if any(job.result == "applied" for job in stats.jobs):
            self._deferred_seconds.labels(model).observe(stats.deferred_seconds)
        self._stale.labels(model).inc(sum(job.rows for job in stats.jobs if job.behind))
        self._budgets.note(job.stream for job in stats.jobs)
        self._confidence.observe(model, np.concatenate([job.confidence.numpy() for job in stats.jobs]))
        entropy = np.concatenate([job.entropy.numpy() for job in stats.jobs])
        self._entropy.observe(model, entropy / math.log(max(stats.classes, 2)))
        self._margin.observe(model, np.concatenate([job.margin.numpy() for job in stats.jobs]))
        for family, signal in (
            (self._distance, DISTANCE),
            (self._agreement, AGREEMENT),
            (self._update_norm, "update_norm"),
        ):
            values = [job.signals[signal] for job in stats.jobs if signal in job.signals]
            if values:
                family.observe(model, np.array(values))
        results = Counted(job.result for job in stats.jobs)
        if not stats.lane.policy.plain and any(results[result] for result in RESULTS):
            for result in RESULTS:  # all start at 0, see _begin
                self._steps.labels(model, policy, result).inc(results[result])
        for job in stats.jobs:
            self._queue_seconds.labels(model).observe(job.queue_seconds)
            self._predictions.labels(model, policy, job.served).inc(job.rows)
            if "selected" in job.signals:
                selected = round(job.signals["selected"] * job.rows)
                self._samples.labels(model, policy, "selected").inc(selected)
                self._samples.labels(model, policy, "left_out").inc(job.rows - selected)

    def stored(self, operation: str, seconds: float) -> None:
        """The keeper wrote (``write``) or read states: for a step that waited (``fetch``) or ahead (``prefetch``)."""
        self._state_seconds.labels(operation).observe(seconds)

    def request(self, call: Call) -> None:
        """See :class:`Recorder`."""
        self._requests.labels(call.model, call.route, call.code).inc()
        if not call.endless:
            self._request_seconds.labels(call.model, call.route).observe(call.seconds)

    def event(self, event: Event) -> None:
        """See :class:`Recorder`."""
        self._events.labels(event.stream.model, event.kind).inc()
        if event.kind in ("departure", "change"):
            self._detections.labels(event.stream.model, event.fields["signal"], event.kind).inc()
        elif event.kind == "guard":
            self._guard(event.stream.model, event.fields)
        elif event.kind == "lost":
            self._lost.labels(event.stream.model, "crash").inc(event.fields["steps"])
            self._lost_before.inc(event.fields["steps"])
        elif event.kind == "damaged" and "went_back_to" in event.fields:
            steps = event.fields["version"] - event.fields["went_back_to"]
            self._lost.labels(event.stream.model, "damage").inc(max(1, steps))

    def _guard(self, model: str, move: Mapping[str, Any]) -> None:
        self._moves.labels(model, move["to"], move["rule"]).inc()
        if move["action"] == Action.ROLLBACK:
            self._rollbacks.labels(model).inc()
        if move["to"] == State.QUARANTINE:
            self._quarantines.labels(model).inc()

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        self._now = self._levels()
        for model in self._now.digests:
            self._begin(model)
        return generate_latest(self._registry)

    def _read(self) -> Levels:
        """The levels, read once for a whole scrape: there may be many streams."""
        return self._now

    def _begin(self, model: str) -> None:
        """Lets a model's counters start at 0: Prometheus does not see how a counter came by its first value."""
        self._errors.labels(model)
        for kind in EVENTS:
            self._events.labels(model, kind)
        for signal, kind in itertools.product(WATCHED, ("departure", "change")):
            self._detections.labels(model, signal, kind)
        for cause in CAUSES:
            self._lost.labels(model, cause)
        for to, rule in MOVES:
            self._moves.labels(model, to, rule)
        self._rollbacks.labels(model)
        self._quarantines.labels(model)

    def render_streams(self, streams: list[Stream]) -> bytes:
        """The families of single streams, of these, for a scrape of their own."""
        registry = CollectorRegistry()
        registry.register(WatchedCollector(lambda: streams, self._monitor))
        return generate_latest(registry)


class RowHistogram(Collector):
    """A histogram by model that takes a whole array of observations at once; non-finite ones are left out."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text = name, text
        self._bounds = np.array(bounds, dtype=np.float64)
        self._labels = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self._totals: dict[str, tuple[NDArray[np.int64], float]] = {}

    def observe(self, model: str, values: NDArray[np.floating[Any]]) -> None:
        """Counts ``values [N]``."""
        values = values[np.isfinite(values)].astype(np.float64)
        counts = np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._labels))
        before, total = self._totals.get(model, (np.zeros_like(counts), 0.0))
        self._totals[model] = (before + counts, total + float(values.sum()))

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        for model, (counts, total) in list(self._totals.items()):
            buckets = list(zip(self._labels, counts.cumsum().astype(float).tolist(), strict=True))
            family.add_metric([model], buckets, total)
        yield family
