"""The real server sends its traces to a collector, and writes its log as JSON."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.e2e.process import Running, started
from tests.serving import MODEL, TIMEOUT, rows

TRACE, CALLER = 16 * "ab", 8 * "cd"


class Collector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.paths: set[str] = set()
        self.services: set[str] = set()
        self.spans: list[Span] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.paths.add(self.path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.services.update(
                one.value.string_value for one in resource.resource.attributes if one.key == "service.name"
            )
            for scope in resource.scope_spans:
                self.server.spans.extend(scope.spans)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            collector.shutdown()
            thread.join()


def stop(server: Running) -> None:
    """Ends the server as an operator does."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(TIMEOUT) == 0


def predict(server: Running, request: str, flags: str) -> httpx.Response:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-{flags}", "X-Request-ID": request}
    return server.http.post("/v1/streams/s/predict", json={"inputs": rows(4).tolist()}, headers=headers)


def said(span: Span) -> dict[str, Any]:
    """The span's attributes."""
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes}


def test_a_trace_arrives_and_the_log_names_it(tmp_path: Path) -> None:
    """Both end complete when the server is told to stop."""
    with collecting() as collector:
        traces = {"endpoint": collector.endpoint, "service_name": "vision"}
        with started(tmp_path, traces=traces, log={"format": "json", "level": "DEBUG"}) as server:
            assert server.http.put("/v1/streams/s").status_code == 201
            for request, flags in (("traced", "01"), ("untraced", "00")):
                response = predict(server, request, flags)
                assert (response.status_code, response.headers["x-request-id"]) == (200, request)
            stop(server)
            log = [json.loads(line) for line in server.log.splitlines()]
    assert collector.paths == {"/v1/traces"}
    assert collector.services == {"vision"}

    spans = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    (request_span,) = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    assert request_span.parent_span_id.hex() == CALLER
    assert request_span.name == "POST /v1/streams/{id}/predict"
    assert said(request_span)["http.response.status_code"] == 200
    assert said(request_span)["tta.request"] == "traced"
    phases = sorted((span for span in spans if span is not request_span), key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in phases] == ["queue", "forward", "deferred", "adapt", "monitor"]
    assert {span.parent_span_id for span in phases} == {request_span.span_id}
    assert {(said(span)["tta.stream"], said(span)["tta.model"], said(span)["tta.result"]) for span in phases} == {
        ("s", MODEL, "applied")
    }
    at = request_span.start_time_unix_nano
    for span in phases:
        assert at <= span.start_time_unix_nano <= span.end_time_unix_nano
        at = span.end_time_unix_nano
    assert at - request_span.start_time_unix_nano < TIMEOUT * 1e9

    assert all({"time", "level", "logger", "message"} <= line.keys() for line in log)
    answered = {line["request"]: line for line in log if line["message"] == "request answered"}
    for request in ("traced", "untraced"):
        line = answered[request]
        assert (line["trace_id"], line["route"], line["code"]) == (TRACE, "/v1/streams/{id}/predict", 200)
        assert (line["model"], line["level"]) == (MODEL, "DEBUG")
    (opened,) = [line for line in log if line.get("event") == "opened"]
    assert (opened["stream"], opened["tenant"], opened["model"], opened["version"]) == ("s", "default", MODEL, 0)
    assert opened["request"] in answered


def test_a_server_without_its_collector_serves_and_ends(tmp_path: Path) -> None:
    with collecting() as collector:
        nowhere, port = collector.endpoint, collector.server_port
    with started(tmp_path, traces={"endpoint": nowhere}) as server:
        assert server.http.put("/v1/streams/s").status_code == 201
        assert predict(server, "r", "01").status_code == 200
        stop(server)
        assert "Traceback" not in server.log
        assert f"port={port}" in server.log, "it says where the spans did not arrive"
