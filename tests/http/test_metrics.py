"""The metrics move with the requests, keep Prometheus' rules, and tell nobody's stream."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.http.conftest import Server, infer_body, scrape, value
from tests.serving import CLASSES, MODEL, rows

pytestmark = pytest.mark.anyio


async def test_metrics_move_with_the_requests(server: Server) -> None:
    before = await scrape(server)
    route = "/v1/streams/{id}/predict"
    await server.open("s")
    await server.open("t", adapt=False)
    entropies: list[float] = []
    for seed in range(4):
        entropies += (await server.predict("s", rows(3, seed)))["entropy"]
    entropies += (await server.predict("t", rows(5)))["entropy"]
    await server.client.get("/v1/streams/nobody")
    await server.client.get("/no/such/path")
    await server.settled()
    after = await scrape(server)
    expected = {
        ("tta_requests_total", "model_name", MODEL, "route", route, "code", "200"): 5,
        ("tta_requests_total", "route", "/v1/streams/{id}", "code", "404"): 1,
        ("tta_requests_total", "route", "unmatched", "code", "404"): 1,
        ("tta_request_duration_seconds_count", "model_name", MODEL, "route", route): 5,
        ("tta_queue_duration_seconds_count", "model_name", MODEL): 5,
        ("tta_compute_duration_seconds_count", "phase", "forward"): 5,
        ("tta_compute_duration_seconds_count", "phase", "source_shadow"): 3,
        ("tta_batch_samples_sum", "model_name", MODEL): 17,
        ("tta_predictions_total", "model_name", MODEL, "policy", "tent"): 12,
        ("tta_predictions_total", "model_name", MODEL, "policy", "source"): 5,
        ("tta_adaptation_steps_total", "policy", "tent", "result", "applied"): 4,
        ("tta_adaptation_steps_total", "policy", "source"): 0,
        ("tta_prediction_confidence_ratio_count", "model_name", MODEL): 17,
        ("tta_prediction_entropy_ratio_count", "model_name", MODEL): 17,
        ("tta_bn_statistics_distance_ratio_count", "model_name", MODEL): 3,
        ("tta_source_agreement_ratio_count", "model_name", MODEL): 2,
        ("tta_streams", "policy", "tent", "adapt", "true"): 1,
        ("tta_streams", "policy", "tent", "adapt", "false"): 1,
        ("tta_stream_states", "tier", "device"): 1,
        ("tta_requests_waiting",): 0,
        ("tta_stream_evictions_total",): 0,
    }
    for (name, *labels), grown in expected.items():
        chosen = dict(zip(labels[::2], labels[1::2], strict=True))
        assert value(after, name, **chosen) - value(before, name, **chosen) == grown, (name, chosen)
    for name in ("tta_model_info", "tta_build_info"):
        assert value(after, name) == 1
    assert value(after, "tta_stream_state_bytes", tier="device") > 0
    ratio = value(after, "tta_prediction_entropy_ratio_sum")
    assert ratio == pytest.approx(sum(entropies) / math.log(len(CLASSES)), rel=1e-4)
    assert value(after, "tta_prediction_entropy_ratio_bucket", le="1.0") == 17
    for name in ("tta_prediction_entropy_ratio_bucket", "tta_prediction_confidence_ratio_bucket"):
        buckets = [one.value for one in after if one.name == name]
        assert buckets == sorted(buckets), "buckets are cumulative"


async def test_no_label_tells_a_stream_or_a_path(server: Server) -> None:
    await server.open("very-secret-stream")
    await server.predict("very-secret-stream", rows(2))
    await server.infer(rows(2), sequence_id="other-secret-stream")
    await server.client.get("/secret/path")
    await server.client.put("/v1/streams/very-secret-stream/predict")
    await server.client.get("/v2/models/secret-model")
    await server.client.post("/v2/models/secret-model/infer", json=infer_body(rows(1)))
    await server.settled()
    text = (await server.client.get("/metrics")).text
    assert "tta_predictions_total" in text
    assert "secret" not in text


async def test_the_metrics_keep_prometheus_rules(server: Server) -> None:
    """The checks of ``promtool check metrics``, on everything that this server names itself."""
    await server.open("s")
    for seed in range(2):
        await server.predict("s", rows(2, seed))
    await server.settled()
    families = list(text_string_to_metric_families((await server.client.get("/metrics")).text))
    ours = [family for family in families if family.name.startswith("tta_")]
    assert len(ours) > 15
    units = {"ms", "milliseconds", "us", "microseconds", "minutes", "hours", "kb", "mb", "kilobytes", "megabytes",
             "percent", "percentage", "celsius", "bits"}  # fmt: skip
    for family in ours:
        names = {sample.name for sample in family.samples}
        assert family.documentation.strip().endswith("."), f"{family.name}: a help text is a sentence"
        assert re.fullmatch("[a-z][a-z0-9_]*", family.name)
        assert not set(family.name.split("_")) & (units | {"counter", "gauge", "histogram", "summary"}), family.name
        assert family.type in ("counter", "gauge", "histogram")
        if family.type == "counter":
            assert all(name == f"{family.name}_total" for name in names)
        else:
            assert not any(name.endswith("_total") for name in names)
        if family.type == "histogram":
            assert names <= {f"{family.name}{suffix}" for suffix in ("_bucket", "_count", "_sum")}
        else:
            assert not family.name.endswith(("_bucket", "_count", "_sum"))
        if "duration" in family.name:
            assert family.name.endswith("_seconds")
        for sample in family.samples:
            assert all(re.fullmatch("[a-z][a-z0-9_]*", label) for label in sample.labels)
            assert ("le" in sample.labels) == sample.name.endswith("_bucket")
    assert "_created" not in {sample.name[-8:] for family in ours for sample in family.samples}


async def test_a_client_that_leaves_while_it_waits_adapts_nothing(server: Server) -> None:
    await server.open("s")
    gate = await server.hold()
    left = asyncio.Event()
    sent: list[Any] = []
    body = json.dumps({"inputs": rows(2).tolist()}).encode()

    async def receive() -> Any:
        if not sent:
            sent.append("body")
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/streams/s/predict", "raw_path": b"/v1/streams/s/predict", "query_string": b"", "headers": [],
        "server": ("test", 80), "client": ("test", 1), "root_path": "",
    }  # fmt: skip
    request = asyncio.create_task(server.app(scope, receive, send))
    await server.waiting(1)
    left.set()
    await request
    assert server.runner.waiting == 0
    gate.open()
    info = await server.info("s")
    assert (info["version"], info["requests"]) == (0, 0)
    samples = await scrape(server)
    assert value(samples, "tta_requests_total", route="/v1/streams/{id}/predict", code="499") == 1
    assert value(samples, "tta_adaptation_steps_total") == 0
