"""Counts and distributions for Prometheus. Nothing else in the project knows the metrics library.

Label values are bounded: models, policies, routes and results, never a stream. Every metric's help text says what it is
and in which unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tta_server import __version__
from tta_server.types import AGREEMENT, DRIFT, Call, StepStats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RATIO = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DISTANCE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Recorder(Protocol):
    """What the rest of the server tells about itself."""

    def step(self, stats: StepStats) -> None:
        """An engine step is over."""

    def request(self, call: Call) -> None:
        """An HTTP request was answered."""


class Recorders:
    """Tells several recorders."""

    def __init__(self, *recorders: Recorder) -> None:
        self._recorders = recorders

    def step(self, stats: StepStats) -> None:
        """See :class:`Recorder`."""
        for recorder in self._recorders:
            recorder.step(stats)

    def request(self, call: Call) -> None:
        """See :class:`Recorder`."""
        for recorder in self._recorders:
            recorder.request(call)


@dataclass(frozen=True)
class Levels:
    """What is read when Prometheus asks."""

    waiting: int
    streams: dict[tuple[str, str, bool], int]
    """Open streams by model, policy and whether adaptation is on."""
    states: dict[str, tuple[int, int]]
    """Streams with a state and their bytes, by tier."""
    evictions: int
    digests: dict[str, str]
    """Source digest by model."""


class PrometheusRecorder:
    """Keeps the metrics in a registry of its own."""

    def __init__(self, levels: Callable[[], Levels]) -> None:
        """``levels`` is called at every scrape."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for every one, which nothing here reads
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        model = ["model_name"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(name, text, model + labels, registry=self._registry)

        def histogram(name: str, text: str, labels: list[str], buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, model + labels, buckets=buckets, registry=self._registry)

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
            "source_shadow (the frozen model on sampled requests).",
            ["phase"],
            SECONDS,
        )
        self._batch_rows = histogram("tta_batch_samples", "Samples in one engine step, of all its streams.", [], ROWS)
        self._predictions = counter("tta_predictions", "Samples answered, by the policy that answered.", ["policy"])
        self._steps = counter(
            "tta_adaptation_steps",
            "Adaptation steps of streams: applied; rejected_nonfinite (state or scores were not finite, nothing kept); "
            "failed (an error after the answer, nothing kept); shed (under pressure, not taken).",
            ["policy", "result"],
        )
        self._confidence = RowHistogram(
            "tta_prediction_confidence_ratio", "Largest served probability of a sample, not calibrated.", RATIO
        )
        self._entropy = RowHistogram(
            "tta_prediction_entropy_ratio", "Entropy of a sample's served probabilities over ln(classes).", RATIO
        )
        self._registry.register(self._confidence)
        self._registry.register(self._entropy)
        self._distance = histogram(
            "tta_bn_statistics_distance_ratio",
            "Of sampled requests: normalised squared 2-Wasserstein distance of the batch's statistics at the source's "
            "batch-norm layers to the stored ones, mean over channels and layers; 0 is source data in large batches.",
            [],
            DISTANCE,
        )
        self._agreement = histogram(
            "tta_source_agreement_ratio",
            "Of sampled requests: share of samples whose served class is the source model's.",
            [],
            RATIO,
        )
        self._registry.register(_LevelsCollector(levels))

    def step(self, stats: StepStats) -> None:
        """See :class:`Recorder`."""
        model, policy = stats.lane.model, stats.lane.policy.name
        for phase, seconds in (
            ("forward", stats.forward_seconds),
            ("adapt", stats.adapt_seconds),
            ("source_shadow", stats.shadow_seconds),
        ):
            if seconds:
                self._compute_seconds.labels(model, phase).observe(seconds)
        if not stats.jobs:
            return
        rows = sum(job.rows for job in stats.jobs)
        self._batch_rows.labels(model).observe(rows)
        self._predictions.labels(model, policy).inc(rows)
        self._confidence.observe(model, np.concatenate([job.confidence.numpy() for job in stats.jobs]))
        entropy = np.concatenate([job.entropy.numpy() for job in stats.jobs])
        self._entropy.observe(model, entropy / math.log(stats.classes))
        for job in stats.jobs:
            self._queue_seconds.labels(model).observe(job.queue_seconds)
            if job.result != "none":
                self._steps.labels(model, policy, job.result).inc()
            if DRIFT in job.signals:
                self._distance.labels(model).observe(job.signals[DRIFT])
            if AGREEMENT in job.signals:
                self._agreement.labels(model).observe(job.signals[AGREEMENT])

    def request(self, call: Call) -> None:
        """See :class:`Recorder`."""
        self._requests.labels(call.model, call.route, call.code).inc()
        self._request_seconds.labels(call.model, call.route).observe(call.seconds)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


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


class _LevelsCollector(Collector):
    """Values that are read, not counted: asked for at every scrape."""

    def __init__(self, levels: Callable[[], Levels]) -> None:
        self._levels = levels

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        levels = self._levels()
        yield GaugeMetricFamily("tta_requests_waiting", "Requests in the queues.", value=levels.waiting)
        streams = GaugeMetricFamily(
            "tta_streams", "Open streams, by policy and whether adaptation is on.",
            labels=["model_name", "policy", "adapt"],
        )  # fmt: skip
        for (model, policy, adapt), count in levels.streams.items():
            streams.add_metric([model, policy, str(adapt).lower()], count)
        yield streams
        held = GaugeMetricFamily("tta_stream_states", "Streams with a state of their own, by tier.", labels=["tier"])
        size = GaugeMetricFamily("tta_stream_state_bytes", "Bytes of stream states, by tier.", labels=["tier"])
        for tier, (count, total) in levels.states.items():
            held.add_metric([tier], count)
            size.add_metric([tier], total)
        yield from (held, size)
        yield CounterMetricFamily(
            "tta_stream_evictions", "Stream states moved from the device to host memory.", value=levels.evictions
        )
        info = GaugeMetricFamily("tta_model_info", "1 for each model.", labels=["model_name", "digest"])
        for model, digest in levels.digests.items():
            info.add_metric([model, digest], 1)
        yield info
        build = GaugeMetricFamily("tta_build_info", "1 for the versions that run.", labels=["version", "torch"])
        build.add_metric([__version__, torch.__version__], 1)
        yield build
