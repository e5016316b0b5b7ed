"""``/v1``: streams as resources, predictions from every kind of body, metrics, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import math
import re
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from pydantic import BaseModel
from torch import Tensor

import adapters
from adapters.tent import Tent
from tests.http.conftest import Loaded, Server, infer_body, running
from tests.serving import CLASSES, LR, MODEL, rows, tiny_network
from tta_server.http import schemas
from tta_server.http.schemas import Prediction, Problem, StreamInfo, StreamList

pytestmark = pytest.mark.anyio


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# Policies and models


async def test_policies(server: Server) -> None:
    listed = (await server.json("GET", "/v1/policies"))["policies"]
    assert [one["name"] for one in listed] == list(adapters.policies())
    tent = await server.json("GET", "/v1/policies/tent")
    assert tent in listed
    assert (tent["scope"], tent["needs"]) == ("norm", [])
    assert tent["summary"]
    assert tent["settings"]["properties"]["lr"] == {"default": 0.001, "title": "Lr", "type": "number"}
    assert tent["settings"]["additionalProperties"] is False


async def test_models(server: Server) -> None:
    (model,) = (await server.json("GET", "/v1/models"))["models"]
    assert model == await server.json("GET", f"/v1/models/{MODEL}")
    assert (model["name"], model["architecture"], model["classes"]) == (MODEL, "TinyNetwork", list(CLASSES))
    assert re.fullmatch("[0-9a-f]{64}", model["digest"])
    assert model["input"]["shape"] == [3, 8, 8]
    assert model["adaptable"] == {"layers": {"BatchNorm2d": 2}, "values": 2 * (6 + 8)}
    assert (model["feature_dim"], model["default_policy"]) == (8, "tent")
    costs = {one["name"]: one for one in model["policies"]}
    assert costs["source"] == {"name": "source", "runs": True, "bytes_per_stream": 0}
    assert costs["tent"]["bytes_per_stream"] >= 3 * 4 * 28, "weights and two moments"


# Streams


async def test_a_stream_from_its_creation_to_its_end(server: Server) -> None:
    created = await server.open("cam-1")
    StreamInfo.model_validate(created)
    assert (created["id"], created["model"], created["policy"], created["adapt"]) == ("cam-1", MODEL, "tent", True)
    assert created["settings"] == dataclasses.asdict(Tent(lr=LR))
    assert (created["version"], created["requests"], created["last_seen"]) == (0, 0, None)
    assert (created["tier"], created["drift"], created["signals"]) == ("none", None, {})

    assert await server.json("PUT", "/v1/streams/cam-1") == created, "an empty body confirms"
    await server.predict("cam-1", rows(4))
    seen = await server.info("cam-1")
    assert (seen["version"], seen["requests"], seen["tier"]) == (1, 1, "device")
    assert (created["state_bytes"], seen["state_bytes"]) == (None, 3 * 4 * 28 + 8), "weights, two moments, a counter"
    assert seen["last_seen"] >= seen["created"] == created["created"]
    assert {"loss", "entropy", "confidence", "bn_distance", "agreement"} <= seen["signals"].keys()
    assert seen["drift"] == seen["signals"]["bn_distance"] > 0

    off = await server.json("PATCH", "/v1/streams/cam-1", json={"adapt": False})
    assert off == seen | {"adapt": False}
    reset = await server.json("POST", "/v1/streams/cam-1/reset")
    assert (reset["version"], reset["tier"], reset["signals"], reset["adapt"]) == (0, "none", {}, False)

    response = await server.client.delete("/v1/streams/cam-1")
    assert (response.status_code, response.content) == (204, b"")
    assert "cam-1" in (await server.json("GET", "/v1/streams/cam-1", 404))["error"]
    assert await server.json("GET", "/v1/streams") == {"streams": []}


async def test_streams_are_listed_as_they_came(server: Server) -> None:
    made = [await server.open(id) for id in "cab"]
    assert await server.json("GET", "/v1/streams") == {"streams": made}


async def test_a_stream_takes_what_it_is_asked_for(server: Server) -> None:
    body = {"model": MODEL, "policy": "norm", "settings": {"mode": "running"}, "adapt": False}
    made = await server.open("s", **body)
    assert (made["policy"], made["settings"]["mode"], made["settings"]["alpha"]) == ("norm", "running", 0.1)
    assert made["adapt"] is False
    assert await server.json("PUT", "/v1/streams/s", json=body) == made
    assert (await server.json("PUT", "/v1/streams/s", json={"adapt": True}))["adapt"] is True


# Predictions


def oracle(x: Tensor, batch_statistics: bool) -> Tensor:
    """What plain torch computes: with the stored statistics, or, as TENT before its first step, with the batch's."""
    network = tiny_network().train(batch_statistics)
    with torch.no_grad():
        scores: Tensor = network(x)
    return scores


async def test_a_prediction_is_the_networks(server: Server) -> None:
    await server.open("s")
    x = rows(6)
    got = await server.predict("s", x)
    Prediction.model_validate(got)
    probabilities = tensor(got["probabilities"])
    torch.testing.assert_close(probabilities, oracle(x, True).softmax(1), rtol=1e-4, atol=1e-5)
    assert got["classes"] == probabilities.argmax(1).tolist()
    assert got["labels"] == [CLASSES[one] for one in got["classes"]]
    torch.testing.assert_close(tensor(got["confidence"]), probabilities.amax(1))
    entropy = -(probabilities * probabilities.log()).sum(1)
    torch.testing.assert_close(tensor(got["entropy"]), entropy, rtol=1e-4, atol=1e-5)
    assert "logits" not in got
    facts = (got["stream"], got["model"], got["policy"], got["version"], got["adapted"], got["replayed"])
    assert facts == ("s", MODEL, "tent", 0, True, False)
    assert got["queue_seconds"] >= 0
    assert got["inference_seconds"] > 0

    logits = await server.predict("s", x, output="logits", adapt=False)
    torch.testing.assert_close(tensor(logits["logits"]), oracle(x, False), rtol=1e-4, atol=1e-5)
    assert "probabilities" not in logits
    assert (logits["policy"], logits["version"], logits["adapted"]) == ("source", 1, False)


async def test_versions_and_measurements_come_with_the_answers(server: Server) -> None:
    await server.open("s")
    answers = []
    for seed in range(4):
        answers.append(await server.predict("s", rows(4, seed)))
        await server.settled()
    assert [one["version"] for one in answers] == [0, 1, 2, 3]
    assert (answers[0]["drift"], answers[0]["agreement"]) == (None, None), "not measured yet"
    assert answers[1]["drift"] > 0
    assert 0 <= answers[1]["agreement"] <= 1
    assert (await server.info("s"))["requests"] == 4


def npy(array: Any, **arguments: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **arguments)
    return file.getvalue()


def image(pixels: Any, format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


async def test_every_kind_of_body_means_the_same(server: Server) -> None:
    """No Content-Type is sent with any of them."""
    await server.open("s", adapt=False)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    row = pixels.transpose(2, 0, 1)
    real = row / 255
    expected = oracle(torch.from_numpy(real[None].astype(np.float32)), False).flatten().tolist()
    bodies = {
        "json": json.dumps({"inputs": real[None].tolist()}).encode(),
        "json, one row": json.dumps({"inputs": real.tolist()}).encode(),
        "float32": npy(real[None].astype(np.float32)),
        "float64, one row": npy(real),
        "fortran": npy(np.asfortranarray(real[None])),
        "uint8": npy(row),
        "png": image(pixels, "PNG"),
    }
    for name, body in bodies.items():
        request = server.client.build_request("POST", "/v1/streams/s/predict?output=logits", content=body)
        assert "content-type" not in request.headers
        response = await server.client.send(request)
        assert response.status_code == 200, (name, response.text)
        assert response.json()["logits"][0] == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/octet-stream", "text/plain"])
async def test_the_content_type_does_not_matter(server: Server, kind: str) -> None:
    await server.open("s")
    body = json.dumps({"inputs": rows(2).tolist()})
    got = await server.json("POST", "/v1/streams/s/predict", content=body, headers={"content-type": kind})
    assert len(got["classes"]) == 2


async def test_a_big_body_is_decoded_beside_the_loop(server: Server) -> None:
    await server.open("s", adapt=False)
    x = rows(600)
    got = await server.json("POST", "/v1/streams/s/predict?output=logits", content=npy(x.numpy()))
    torch.testing.assert_close(tensor(got["logits"]), oracle(x, False), rtol=1e-4, atol=1e-4)


async def test_a_retry_gets_the_stored_answer(server: Server) -> None:
    await server.open("s")
    first = await server.predict("s", rows(4), seq=1)
    again = await server.predict("s", rows(4), seq=1)
    assert again == first | {"replayed": True}
    assert (await server.info("s"))["version"] == 1


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


async def test_streams_that_share_batches_do_not_meet(loaded: Loaded) -> None:
    ids, turns = ("left", "middle", "right"), 4
    batches = {id: [rows(2 + 2 * place, 10 * place + turn) for turn in range(turns)] for place, id in enumerate(ids)}
    alone: dict[str, list[Any]] = {}
    for id in ids:
        async with running(loaded) as server:
            await server.open(id)
            alone[id] = [await server.predict(id, x) for x in batches[id]]
    async with running(loaded) as server:
        for id in ids:
            await server.open(id)
        together: dict[str, list[Any]] = {id: [] for id in ids}
        for turn in range(turns):
            gate = await server.hold()
            tasks = {id: asyncio.create_task(server.predict(id, batches[id][turn])) for id in ids}
            await server.waiting(3)
            gate.open()
            for id, task in tasks.items():
                together[id].append(await task)
        await server.settled()
        samples = await scrape(server)
        assert value(samples, "tta_batch_samples_count") == turns, "all three went through in one step each time"
    for id in ids:
        for one, other in zip(together[id], alone[id], strict=True):
            assert one["version"] == other["version"]
            torch.testing.assert_close(tensor(one["probabilities"]), tensor(other["probabilities"]), rtol=0, atol=1e-4)
    moved = tensor(alone["left"][0]["probabilities"]) - oracle(batches["left"][0], False).softmax(1)
    assert moved.abs().max() > 1e-3, "adaptation shows, or this test would prove nothing"


# Metrics


async def scrape(server: Server) -> list[Sample]:
    response = await server.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]


def value(samples: list[Sample], name: str, **labels: str) -> float:
    """Sum of the series that carry these labels."""
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


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
        ("tta_compute_duration_seconds_count", "phase", "source_shadow"): 2,
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


# The OpenAPI document


def references(part: Any) -> list[str]:
    """Every ``$ref`` in a document."""
    if isinstance(part, dict):
        own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        return own + [one for value in part.values() for one in references(value)]
    return [one for value in part for one in references(value)] if isinstance(part, list) else []


async def test_every_reference_of_the_openapi_document_resolves(server: Server) -> None:
    document = await server.json("GET", "/openapi.json")
    found = set(references(document))
    assert len(found) > 3
    for reference in found:
        target: Any = document
        assert reference.startswith("#/")
        for part in reference[2:].split("/"):
            assert part in target, f"{reference} leads nowhere"
            target = target[part]


async def test_the_openapi_document_has_every_route_and_only_answers_we_give(server: Server) -> None:
    document = await server.json("GET", "/openapi.json")
    assert document["openapi"].startswith("3.")
    assert set(document["paths"]) == {
        "/metrics",
        "/v1/models", "/v1/models/{name}", "/v1/policies", "/v1/policies/{name}",
        "/v1/streams", "/v1/streams/{id}", "/v1/streams/{id}/predict", "/v1/streams/{id}/reset",
        "/v2", "/v2/health/live", "/v2/health/ready",
        "/v2/models/{name}", "/v2/models/{name}/ready", "/v2/models/{name}/infer",
        "/v2/models/{name}/versions/{version}", "/v2/models/{name}/versions/{version}/ready",
        "/v2/models/{name}/versions/{version}/infer",
    }  # fmt: skip
    identifiers = []
    for path, operations in document["paths"].items():
        declared = {one["name"] for operation in operations.values() for one in operation.get("parameters", [])}
        assert set(re.findall(r"{(\w+)}", path)) <= declared
        for method, operation in operations.items():
            assert operation["summary"]
            identifiers.append(operation["operationId"])
            assert "422" not in operation["responses"], (method, path)
            if path != "/metrics":
                for status in ("4XX", "5XX"):
                    schema = operation["responses"][status]["content"]["application/json"]["schema"]
                    assert schema["$ref"].endswith("/Problem")
    assert len(set(identifiers)) == len(identifiers)
    assert "422" not in json.dumps(document)
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()


async def test_every_documented_operation_is_there(server: Server) -> None:
    """Documented paths and methods reach a handler: none of them is an unknown path or a wrong method."""
    document = await server.json("GET", "/openapi.json")
    for path, operations in document["paths"].items():
        for method in operations:
            target = re.sub(r"{\w+}", "nothing", path)
            response = await server.client.request(method.upper(), target)
            assert response.status_code != 405, (method, path)
            assert "no such path" not in response.text, (method, path)


async def test_answers_are_as_documented(server: Server) -> None:
    """The schemas in the document are these classes; extra or missing keys would be a lie."""
    document = await server.json("GET", "/openapi.json")
    schemas = document["components"]["schemas"]
    await server.open("s")
    prediction = await server.predict("s", rows(2))
    documented: dict[str, tuple[type[BaseModel], Any]] = {
        "StreamInfo": (StreamInfo, await server.info("s")),
        "StreamList": (StreamList, await server.json("GET", "/v1/streams")),
        "Prediction": (Prediction, prediction),
        "Problem": (Problem, await server.json("GET", "/v1/streams/x", 404)),
    }
    for name, (kind, content) in documented.items():
        kind.model_validate(content)
        assert set(schemas[name]["properties"]) >= content.keys(), name
        assert content.keys() >= set(schemas[name].get("required", ())), name


async def test_every_answer_fits_its_documented_schema(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each route that answers JSON is called; its answer has what its model says, and nothing else at any depth."""
    model = server.service.models[MODEL]
    refused = {"name": "norm", "runs": False, "reason": "not on this one"}
    monkeypatch.setitem(server.service.models, MODEL, replace(model, reports={**model.reports, "norm": refused}))
    document = await server.json("GET", "/openapi.json")
    await server.open("s")
    x = rows(2)
    bodies: dict[tuple[str, str], Any] = {
        ("patch", "/v1/streams/{id}"): {"adapt": True},
        ("post", "/v1/streams/{id}/predict"): {"inputs": x.tolist()},
        ("post", "/v2/models/{name}/infer"): infer_body(x) | {"id": "7"},
        ("post", "/v2/models/{name}/versions/{version}/infer"): infer_body(x, sequence_id="s", sequence_start=True),
    }
    called = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path == "/metrics" or method == "delete":
                continue
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert "$ref" in schema, (method, path, "the document does not say what comes back")
            kind: type[BaseModel] = getattr(schemas, schema["$ref"].rpartition("/")[2])
            name = "tent" if "policies" in path else MODEL
            target = path.format(id="s", name=name, version="1")
            content = await server.json(method.upper(), target, json=bodies.get((method, path)))
            read = kind.model_validate(content)
            assert read.model_dump(mode="json", exclude_unset=True) == content, (method, path)
            called.add((method, path))
    assert bodies.keys() < called
    assert len(called) == 19


async def test_the_documentation_page_is_served(server: Server) -> None:
    response: httpx.Response = await server.client.get("/docs")
    assert response.status_code == 200
    assert "openapi.json" in response.text
