"""OpenTelemetry traces: a span for each phase of a request's step. Needs the extra ``otel``.

The span of the HTTP request itself is made by the framework, which is told of :attr:`Traces.provider`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tta_server import __version__
from tta_server.settings import TraceSettings
from tta_server.types import Call, Event, JobStats, StepStats, Stream

CLOSES = 5.0
"""Seconds for the last spans when the server ends; the collector may be gone."""

_w3c = TraceContextTextMapPropagator()


class Traces:
    """A recorder that traces steps. Spans are sent by a thread of their own; what it cannot keep up with is lost."""

    def __init__(self, settings: TraceSettings, verdict: Callable[[Stream], str]) -> None:
        """``verdict`` gives a stream's, as of its last step."""
        self._verdict = verdict
        self.provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(settings.sample_ratio),
            resource=Resource.create({"service.name": settings.service_name, "service.version": __version__}),
            shutdown_on_exit=False,
        )
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(settings.endpoint)))
        self._tracer = self.provider.get_tracer("tta_server", __version__)

    def begin(self, request: str) -> str:
        """Notes the request's id in the current span, which is that of the HTTP request, and returns its
        ``traceparent``."""
        carrier: dict[str, str] = {}
        trace.get_current_span().set_attribute("tta.request", request)
        _w3c.inject(carrier)
        return carrier.get("traceparent", "")

    def step(self, stats: StepStats) -> None:
        """Spans for each request of a step. They show the step's times, which are the same for all that share it."""
        started = stats.ended
        spans: list[tuple[str, float, float]] = []
        for name, seconds in (
            ("monitor", stats.monitor_seconds),
            ("source_shadow", stats.shadow_seconds),
            ("adapt", stats.adapt_seconds),
            ("deferred", stats.deferred_seconds),
            ("forward", stats.forward_seconds),
        ):
            ended, started = started, started - seconds
            if seconds:
                spans.append((name, started, ended))
        rows = sum(job.rows for job in stats.jobs)
        for job in stats.jobs:
            parent = _w3c.extract({"traceparent": job.origin.trace})
            if not trace.get_current_span(parent).get_span_context().trace_flags.sampled:
                continue
            attributes = self._attributes(stats, job) | {"tta.step_rows": rows}
            for name, begin, end in (("queue", started - job.queue_seconds, started), *reversed(spans)):
                if name not in ("adapt", "deferred") or job.result not in ("none", "shed"):
                    span = self._tracer.start_span(name, parent, attributes=attributes, start_time=_nanoseconds(begin))
                    span.end(_nanoseconds(end))

    def request(self, call: Call) -> None:
        """See :class:`tta_server.metrics.Recorder`."""

    def event(self, event: Event) -> None:
        """See :class:`tta_server.metrics.Recorder`."""

    def close(self) -> None:
        """Sends what is left, for ``CLOSES`` seconds at most."""
        closing = threading.Thread(target=self.provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSES)

    def _attributes(self, stats: StepStats, job: JobStats) -> dict[str, str | int]:
        about: dict[str, str | int] = {
            "tta.model": stats.lane.model,
            "tta.policy": stats.lane.policy.name,
            "tta.rows": job.rows,
            "tta.result": job.result,
        }
        if job.stream.id:
            about |= {
                "tta.stream": job.stream.id,
                "tta.tenant": job.stream.tenant,
                # The one that answered.
                "tta.state_version": job.stream.version - (job.result == "applied"),
                "tta.verdict": self._verdict(job.stream),
            }
        return about


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
