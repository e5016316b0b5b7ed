"""Traces of the running application, by the real SDK; only the exporter keeps its spans instead of sending them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import torch
from pydantic import ValidationError

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from adapters.tent import Tent
from tests.http.conftest import PREDICT, Server, running
from tests.serving import MODEL, Gate, Loaded, load, rows, start, stream_of
from tta_server import __version__, app, traces
from tta_server.errors import ConfigError
from tta_server.settings import TraceSettings
from tta_server.types import JobStats, Origin, StepStats

pytestmark = pytest.mark.anyio

TRACE, CALLER = 16 * "ab", 8 * "cd"
PARENT = f"00-{TRACE}-{CALLER}-01"
UNSAMPLED = f"00-{TRACE}-{CALLER}-00"
ENDPOINT = "http://127.0.0.1:9/v1/traces"

Traced = Callable[..., AbstractAsyncContextManager[Server]]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What takes the spans; they are all there once the application has ended."""
    made = InMemorySpanExporter()
    monkeypatch.setattr(traces, "OTLPSpanExporter", lambda endpoint: made)
    return made


@pytest.fixture
def traced(loaded: Loaded, exporter: InMemorySpanExporter) -> Traced:
    """The application with traces, of so many of its requests."""

    @asynccontextmanager
    async def run(sample_ratio: float = 1.0) -> AsyncIterator[Server]:
        settings, models = loaded
        asked = TraceSettings(endpoint=ENDPOINT, service_name="vision", sample_ratio=sample_ratio)
        async with running((settings.model_copy(update={"traces": asked}), models)) as server:
            yield server

    return run


async def predict(server: Server, id: str = "s", count: int = 4, traceparent: str = PARENT, **query: Any) -> None:
    """A request that may learn."""
    response = await server.client.post(
        f"/v1/streams/{id}/predict",
        json={"inputs": rows(count).tolist()},
        params=query,
        headers={"traceparent": traceparent, "X-Request-ID": f"of-{id}"},
    )
    assert response.status_code == 200
    await server.settled()


def identity(span: ReadableSpan) -> tuple[str, str]:
    """Trace and span, in hex."""
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def parent_of(span: ReadableSpan) -> str:
    assert span.parent is not None
    return f"{span.parent.span_id:016x}"


def said(span: ReadableSpan) -> dict[str, Any]:
    """The span's attributes."""
    return dict(span.attributes or {})


def times(span: ReadableSpan) -> tuple[int, int]:
    """Start and end, nanoseconds."""
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def servers(spans: Sequence[ReadableSpan], name: str = "POST /v1/streams/{id}/predict") -> list[ReadableSpan]:
    return [span for span in spans if span.kind is SpanKind.SERVER and span.name == name]


def children(spans: Sequence[ReadableSpan], parent: ReadableSpan) -> dict[str, ReadableSpan]:
    """The spans right below another, by name."""
    own = [span for span in spans if span.parent and parent.context and span.parent.span_id == parent.context.span_id]
    named = {span.name: span for span in own}
    assert len(named) == len(own)
    return named


async def test_a_request_is_one_trace_under_that_of_its_client(traced: Traced, exporter: InMemorySpanExporter) -> None:
    async with traced() as server:
        await server.open("s")
        await predict(server)
        await predict(server, traceparent="")
    spans = exporter.get_finished_spans()
    first, second = servers(spans)
    assert identity(first)[0] == TRACE
    assert parent_of(first) == CALLER
    assert identity(second)[0] != TRACE
    assert second.parent is None
    found = children(spans, first)
    assert list(found) == ["queue", "forward", "deferred", "adapt", "source_shadow", "monitor"]
    assert {identity(span)[0] for span in found.values()} == {TRACE}
    assert {identity(span)[0] for span in children(spans, second).values()} == {identity(second)[0]}
    assert len({identity(span) for span in spans}) == len(spans)


async def test_what_the_spans_say(traced: Traced, exporter: InMemorySpanExporter) -> None:
    async with traced() as server:
        await server.open("s")
        await predict(server)
        await predict(server)
        verdict = (await server.info("s"))["verdict"]
    spans = exporter.get_finished_spans()
    _, second = servers(spans)
    assert {
        "http.request.method": "POST",
        "http.route": "/v1/streams/{id}/predict",
        "http.response.status_code": 200,
        "url.path": PREDICT,
        "url.scheme": "http",
        "tta.request": "of-s",
    }.items() <= said(second).items()
    assert second.resource.attributes["service.name"] == "vision"
    assert second.resource.attributes["service.version"] == __version__
    for span in children(spans, second).values():
        assert said(span) == {
            "tta.model": MODEL,
            "tta.policy": "tent",
            "tta.stream": "s",
            "tta.tenant": "default",
            "tta.state_version": 1,
            "tta.verdict": verdict,
            "tta.result": "applied",
            "tta.rows": 4,
            "tta.step_rows": 4,
        }


async def test_requests_that_share_a_step_have_its_spans_each(traced: Traced, exporter: InMemorySpanExporter) -> None:
    async with traced() as server:
        for id in ("a", "b"):
            await server.open(id)
        gate: Gate = await server.hold()
        tasks = [start(predict(server, id, count, traceparent="")) for id, count in (("a", 2), ("b", 3))]
        await server.waiting(2)
        gate.open()
        for task in tasks:
            await task
    spans = exporter.get_finished_spans()
    both = [children(spans, one) for one in servers(spans)]
    assert sorted((said(one["forward"])["tta.stream"], said(one["forward"])["tta.rows"]) for one in both) == [
        ("a", 2), ("b", 3),
    ]  # fmt: skip
    assert [said(one["forward"])["tta.step_rows"] for one in both] == [5, 5]
    assert times(both[0]["forward"]) == times(both[1]["forward"])
    assert times(both[0]["queue"])[0] != times(both[1]["queue"])[0]


async def test_times_follow_one_another(traced: Traced, exporter: InMemorySpanExporter) -> None:
    async with traced() as server:
        await server.open("s")
        await predict(server)
    spans = exporter.get_finished_spans()
    (request,) = servers(spans)
    last = times(request)[0]
    for place, span in enumerate(children(spans, request).values()):
        begin, end = times(span)
        assert begin <= end
        assert begin == last or (place == 0 and begin > last)
        last = end


@pytest.mark.parametrize(
    ("result", "shadow", "adapts"),
    [("applied", 0.5, True), ("rejected_nonfinite", 0.0, True), ("failed", 0.0, True), ("none", 0.5, False),
     ("shed", 0.0, False)],
)  # fmt: skip
def test_a_step_that_ended_at_second_20(
    exporter: InMemorySpanExporter, result: str, shadow: float, adapts: bool
) -> None:
    """2 s in the queue, 3 forward, 2 for the rest of the policy's step, some for the shadow, 1.5 for the monitor."""
    stream, rowwise = stream_of(Tent()), torch.zeros(4)
    stream.version = 7
    job = JobStats(stream, 4, 2.0, rowwise, rowwise, rowwise, result, origin=Origin("r", PARENT))
    made = traces.Traces(TraceSettings(endpoint=ENDPOINT), verdict=lambda stream: "drifted")
    made.step(StepStats(stream.lane, 5, [job], 3.0, 2.0, shadow, 1.5, ended=20.0))
    made.close()
    spans = exporter.get_finished_spans()
    at = 13.5 - shadow
    expected = [("queue", at - 2, at), ("forward", at, at + 3)]
    expected += [("adapt", at + 3, at + 5)] if adapts else []
    expected += [("source_shadow", 18.0, 18.5)] if shadow else []
    assert [(span.name, *(time / 1e9 for time in times(span))) for span in spans] == [*expected, ("monitor", 18.5, 20)]
    for span in spans:
        assert (said(span)["tta.result"], said(span)["tta.verdict"]) == (result, "drifted")
        assert said(span)["tta.state_version"] == (6 if result == "applied" else 7), "the one that answered"


async def test_requests_without_a_stream_or_without_adaptation(traced: Traced, exporter: InMemorySpanExporter) -> None:
    async with traced() as server:
        await server.infer(rows(3))
        await server.open("s")
        await predict(server, adapt="false")
    spans = exporter.get_finished_spans()
    (nobody,) = servers(spans, "POST /v2/models/{name}/infer")
    (plain,) = servers(spans)
    for span in children(spans, nobody).values():
        assert said(span) == {
            "tta.model": MODEL, "tta.policy": "source", "tta.rows": 3, "tta.step_rows": 3, "tta.result": "none",
        }  # fmt: skip
    forward = said(children(spans, plain)["forward"])
    assert (forward["tta.stream"], forward["tta.policy"]) == ("s", "source")
    assert "adapt" not in children(spans, nobody) | children(spans, plain)


async def test_errors(traced: Traced, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tta_server.http.v1.describe", fail)
    async with traced() as server:
        for path in ("/v1/policies", "/v1/streams/nobody", "/no/such/path"):
            await server.client.get(path)
    broken, unknown, nowhere = exporter.get_finished_spans()
    codes = [said(span)["http.response.status_code"] for span in (broken, unknown, nowhere)]
    assert codes == [500, 404, 404]
    assert [span.status.status_code for span in (broken, unknown, nowhere)] == [
        StatusCode.ERROR, StatusCode.UNSET, StatusCode.UNSET,
    ]  # fmt: skip
    assert [span.name for span in (broken, unknown, nowhere)] == ["GET /v1/policies", "GET /v1/streams/{id}", "GET"]


@pytest.mark.parametrize(
    ("sample_ratio", "traceparent", "sampled"),
    [
        (1.0, "", True), (0.0, "", False), (0.0, PARENT, True), (1.0, UNSAMPLED, False),
        (1.0, "00-zz-zz-01", True), (0.0, "00-zz-zz-01", False),
    ],
)  # fmt: skip
async def test_the_client_decides_before_the_ratio_does(
    traced: Traced, exporter: InMemorySpanExporter, sample_ratio: float, traceparent: str, sampled: bool
) -> None:
    async with traced(sample_ratio) as server:
        await server.open("s")
        exporter.clear()
        await predict(server, traceparent=traceparent)
    spans = exporter.get_finished_spans()
    names = ["queue", "forward", "deferred", "adapt", "source_shadow", "monitor"]
    assert [list(children(spans, span)) for span in servers(spans)] == ([names] if sampled else [])
    assert sampled or not [span for span in spans if span.name in names]


async def test_without_the_section_there_are_none(loaded: Loaded, exporter: InMemorySpanExporter) -> None:
    async with running(loaded) as server:
        await server.open("s")
        await predict(server)
        assert server.service.tenant("default").stream("s").version == 1
    assert exporter.get_finished_spans() == ()
    code = (
        "import sys, tta_server.cli; sys.exit('opentelemetry.sdk' in sys.modules or 'tta_server.traces' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, "loaded though nobody asked"


def test_a_package_that_is_missing_is_named(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tta_server.traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    settings, models = loaded
    asked = settings.model_copy(update={"traces": TraceSettings(endpoint=ENDPOINT)})
    with pytest.raises(ConfigError, match=r"opentelemetry\.exporter.*pip install 'tta-server\[otel\]'"):
        app.create_app(asked, models)


def test_a_collector_that_hangs_does_not_keep_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    class Stuck(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            gate.pass_through()
            return SpanExportResult.SUCCESS

    monkeypatch.setattr(traces, "OTLPSpanExporter", lambda endpoint: Stuck())
    monkeypatch.setattr(traces, "CLOSES", 0.01)
    made = traces.Traces(TraceSettings(endpoint=ENDPOINT), verdict=lambda stream: "")
    made.provider.get_tracer("test").start_span("last").end()
    made.close()
    gate.reached()
    gate.open()


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:4318", "http://127.0.0.1:4318", "http://127.0.0.1:4318/", "grpc://h/v1"]
)
def test_endpoints_that_are_no_whole_url(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="give the whole URL"):
        TraceSettings(endpoint=endpoint)
