"""What is not counted but read when Prometheus asks: levels, how all streams are spread, and single watched streams.

Three tiers keep the number of series bounded, however many streams there are:

*all streams* as distributions: for each model and signal a histogram of the streams' present values, so that
``histogram_quantile(0.99, ...)`` of the buckets, not of their rate, says how the worst percent of streams is off;

*watched streams*, with the stream as a label: those that the config names, and those with the highest drift scores;

*any stream*, with the same families, at ``/metrics/streams`` for a scrape of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate

import numpy as np
import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tta_server import __version__
from tta_server.drift.monitor import Monitor, Verdict
from tta_server.drift.signals import AGREEMENT, BENEFIT, DRIFT, Floats
from tta_server.state.keeper import Keeping
from tta_server.state.memory import Budget
from tta_server.trust.labels import LabelStatus
from tta_server.types import Stream

RATIO = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
ZSCORE = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 50.0)
DIVERGENCE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
GAIN = (-0.5, -0.2, -0.1, -0.04, -0.02, 0.0, 0.02, 0.04, 0.1, 0.2, 0.3, 0.5)
GAP = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
LENGTH = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
MOST_WATCHED = 200
"""Streams with series of their own, whatever the config says."""

OF_A_STREAM: tuple[tuple[str, str, bool, str], ...] = (
    ("drift_zscore", DRIFT, True, "A watched stream's drift score, see GET /v1/streams/{id}."),
    ("confidence_ratio", "confidence", False, "A watched stream's largest served probability, moving average."),
    ("entropy_ratio", "entropy", False, "A watched stream's served entropy over ln(classes), moving average."),
    ("agreement_ratio", AGREEMENT, False, "A watched stream's share of the source's classes, moving average."),
    ("label_divergence_ratio", "label_divergence", False, "Divergence of a watched stream's served classes."),
    ("parameter_distance_ratio", "parameter_distance", False, "How far a watched stream's weights are off."),
    ("benefit_ratio", BENEFIT, False, "Accuracy that a watched stream's adaptation is estimated to gain."),
)  # fmt: skip


@dataclass(frozen=True)
class Levels:
    """What is read when Prometheus asks."""

    waiting: int
    streams: list[Stream]
    """All that are open."""
    states: dict[str, tuple[int, int]]
    """Streams with a state and their bytes, by tier."""
    evictions: int
    """From the device to host memory."""
    page_outs: int
    """From host memory; these states are on the disk."""
    keeping: Keeping
    digests: dict[str, str]
    """Source digest by model."""
    references: dict[str, bool]
    """By model, whether the monitor has clean data to compare with."""
    budget: Budget
    """Of the states in memory."""
    labels: Sequence[LabelStatus] = ()
    """What labels said, of every tenant."""


class LevelsCollector(Collector):
    """Single values."""

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
        counts = Counter((one.model, one.policy.name, one.adapt) for one in levels.streams)
        for (model, policy, adapt), count in counts.items():
            streams.add_metric([model, policy, str(adapt).lower()], count)
        yield streams
        held = GaugeMetricFamily("tta_stream_states", "Streams with a state of their own, by tier.", labels=["tier"])
        size = GaugeMetricFamily("tta_stream_state_bytes", "Bytes of stream states, by tier.", labels=["tier"])
        for tier, (number, total) in levels.states.items():
            held.add_metric([tier], number)
            size.add_metric([tier], total)
        yield from (held, size)
        yield CounterMetricFamily(
            "tta_stream_evictions", "Stream states moved from the device to host memory.", value=levels.evictions
        )
        reference = GaugeMetricFamily(
            "tta_monitor_reference", "1 where the model has clean data to compare with, see tta-server prepare.",
            labels=["model_name"],
        )  # fmt: skip
        for model, there in levels.references.items():
            reference.add_metric([model], there)
        yield reference
        info = GaugeMetricFamily("tta_model_info", "1 for each model.", labels=["model_name", "digest"])
        for model, digest in levels.digests.items():
            info.add_metric([model, digest], 1)
        yield info
        build = GaugeMetricFamily("tta_build_info", "1 for the versions that run.", labels=["version", "torch"])
        build.add_metric([__version__, torch.__version__], 1)
        yield build
        if torch.cuda.is_available():
            memory = GaugeMetricFamily("tta_device_memory_bytes", "Memory on the device.", labels=["device", "kind"])
            for index in range(torch.cuda.device_count()):
                memory.add_metric([f"cuda:{index}", "allocated"], torch.cuda.memory_allocated(index))
                memory.add_metric([f"cuda:{index}", "reserved"], torch.cuda.memory_reserved(index))
            yield memory


class StreamsCollector(Collector):
    """How the streams of each model are spread now."""

    def __init__(self, levels: Callable[[], Levels], monitor: Monitor) -> None:
        self._levels, self._monitor = levels, monitor

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        by_model: dict[str, list[Stream]] = {}
        for stream in self._levels().streams:
            by_model.setdefault(stream.model, []).append(stream)
        surveys = {model: self._monitor.survey(streams) for model, streams in by_model.items()}
        verdicts = GaugeMetricFamily(
            "tta_stream_verdicts", "Open streams by the monitor's verdict.", labels=["model_name", "verdict"]
        )
        for model, survey in surveys.items():
            counts = Counter(survey.verdicts())
            for verdict in Verdict:
                verdicts.add_metric([model, verdict], counts[verdict])
        yield verdicts

        def spread(name: str, text: str, signal: str, scored: bool, bounds: Sequence[float]) -> Metric:
            family = HistogramMetricFamily(name, text + "; streams now, so not to be rated.", labels=["model_name"])
            for model, survey in surveys.items():
                family.add_metric([model], *buckets(survey.values(signal, scored), bounds))
            return family

        yield spread("tta_streams_drift_zscore", "Drift scores of the streams", DRIFT, True, ZSCORE)
        thirds = HistogramMetricFamily(
            "tta_streams_bn_distance_zscore",
            "Moving averages of the streams' z-scores of bn_distance, by depth; streams now, so not to be rated.",
            labels=["model_name", "group"],
        )
        for model, survey in surveys.items():
            for third in ("early", "middle", "late"):
                thirds.add_metric([model, third], *buckets(survey.values(f"bn_distance_{third}", True), ZSCORE))
        yield thirds
        accuracy = HistogramMetricFamily(
            "tta_streams_estimated_accuracy_ratio",
            "Moving averages of the streams' accuracies as estimated without labels, of the adapted model and of the "
            "source, by ATC and by PDD; streams now, so not to be rated.",
            labels=["model_name", "predictor", "estimator"],
        )
        for model, survey in surveys.items():
            for estimator in ("atc", "pdd"):
                for predictor, prefix in (("adapted", ""), ("source", "source_")):
                    values = survey.values(f"{prefix}accuracy_{estimator}")
                    accuracy.add_metric([model, predictor, estimator], *buckets(values, RATIO))
        yield accuracy
        for name, text, signal, bounds in (
            (
                "label_divergence",
                "Jensen-Shannon divergence of the served classes from clean data's",
                "label_divergence",
                DIVERGENCE,
            ),
            ("agreement", "Share of samples with the source's class", AGREEMENT, RATIO),
            ("confidence", "Moving averages of the largest served probability", "confidence", RATIO),
            ("diversity", "Moving averages of H(mean probabilities) / ln(classes)", "diversity", RATIO),
            (
                "parameter_distance",
                "Norm of all change of the weights since the source over the source's",
                "parameter_distance",
                LENGTH,
            ),
            ("benefit", "Accuracy that the streams' adaptation is estimated to gain, as last estimated", BENEFIT, GAIN),
            (
                "estimator_disagreement",
                "How far the two estimates of the adapted model's accuracy are apart",
                "estimator_disagreement",
                GAP,
            ),
        ):
            yield spread(f"tta_streams_{name}_ratio", text, signal, False, bounds)


class WatchedCollector(Collector):
    """Single streams, each by its name."""

    LABELS = ("model_name", "tenant", "stream")

    def __init__(self, streams: Callable[[], list[Stream]], monitor: Monitor) -> None:
        self._streams, self._monitor = streams, monitor

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        streams = self._streams()
        survey = self._monitor.survey(streams)
        names = [[stream.model, stream.tenant, stream.id] for stream in streams]
        for name, signal, scored, text in OF_A_STREAM:
            family = GaugeMetricFamily(f"tta_stream_{name}", text, labels=self.LABELS)
            for labels, value in zip(names, survey.values(signal, scored).tolist(), strict=True):
                if value == value:
                    family.add_metric(labels, value)
            yield family
        drifted = GaugeMetricFamily(
            "tta_stream_drifted", "1 while a watched stream's verdict is 'drifted'.", labels=self.LABELS
        )
        version = GaugeMetricFamily(
            "tta_stream_version", "A watched stream's version: adaptation steps since the source.", labels=self.LABELS
        )
        adapted = GaugeMetricFamily(
            "tta_stream_serves_adapted", "1 while a watched stream may be served as adapted.", labels=self.LABELS
        )
        for labels, stream, verdict in zip(names, streams, survey.verdicts(), strict=True):
            drifted.add_metric(labels, verdict == Verdict.DRIFTED)
            version.add_metric(labels, stream.version)
            adapted.add_metric(labels, stream.adapt and (stream.guarded is None or stream.guarded.serves))
        yield from (drifted, version, adapted)
        yield GaugeMetricFamily(
            "tta_metrics_watched_streams", "Streams that have series of their own here.", value=len(streams)
        )


class Watchlist:
    """Which streams have series of their own: those named, and the worst by drift score.

    A stream that was among the worst stays, beside them, until it is beyond twice their number: those in the middle do
    not come and go with every scrape.
    """

    def __init__(self, patterns: Sequence[str], worst: int) -> None:
        """``patterns`` of ids, with ``*`` and ``?``."""
        self._named = matcher(patterns)
        self._worst = worst
        self._chosen: set[Stream] = set()

    def choose(self, streams: list[Stream], monitor: Monitor) -> list[Stream]:
        """At most ``MOST_WATCHED`` of the streams."""
        named = [stream for stream in streams if self._named(stream)]
        scores = monitor.survey(streams).values(DRIFT, True)
        order = np.argsort(-scores, kind="stable")
        order = order[np.isfinite(scores[order])][: 2 * self._worst]
        ranked = [streams[index] for index in order.tolist()]
        worst = ranked[: self._worst] + [stream for stream in ranked[self._worst :] if stream in self._chosen]
        self._chosen = set(worst)
        return list(dict.fromkeys([*worst, *named]))[:MOST_WATCHED]


def matcher(patterns: Sequence[str]) -> Callable[[Stream], bool]:
    """Whether a stream's id fits one of the patterns."""
    if not patterns:
        return lambda stream: False
    pattern = re.compile("|".join(translate(one) for one in patterns))
    return lambda stream: pattern.match(stream.id) is not None


def buckets(values: Floats, bounds: Sequence[float]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative counts of the values that are not NaN, and their sum."""
    values = np.sort(values[np.isfinite(values)])
    counts = [*np.searchsorted(values, bounds, side="right").tolist(), len(values)]
    labels = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(labels, map(float, counts), strict=True)), float(values.sum())
