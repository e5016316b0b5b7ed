"""The Open Inference Protocol: health, metadata, JSON tensors, and streams named by ``sequence_id``."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.http.conftest import Loaded, Server, infer_body, running
from tests.serving import MODEL, Gate, rows, tiny_network
from tta_server import __version__
from tta_server.types import Stream

pytestmark = pytest.mark.anyio

INFER = f"/v2/models/{MODEL}/infer"


def output(answer: Any, name: str = "logits") -> Tensor:
    """An output tensor of a response."""
    (found,) = (one for one in answer["outputs"] if one["name"] == name)
    assert found["datatype"] == "FP32"
    return torch.tensor(found["data"], dtype=torch.float32).reshape(found["shape"])


def source_scores(x: Tensor) -> Tensor:
    """What plain torch computes."""
    with torch.no_grad():
        scores: Tensor = tiny_network()(x)
    return scores


# Health and metadata


async def test_health(server: Server) -> None:
    assert await server.json("GET", "/v2/health/live") == {"live": True}
    assert await server.json("GET", "/v2/health/ready") == {"ready": True}
    assert await server.json("GET", f"/v2/models/{MODEL}/ready") == {"name": MODEL, "ready": True}
    assert await server.json("GET", f"/v2/models/{MODEL}/versions/1/ready") == {"name": MODEL, "ready": True}


async def test_a_draining_server_is_alive_but_not_ready(loaded: Loaded) -> None:
    async with running(loaded) as server:
        await server.service.drain()
        assert await server.json("GET", "/v2/health/live") == {"live": True}
        for path in ("/v2/health/ready", f"/v2/models/{MODEL}/ready"):
            assert "shutting down" in (await server.json("GET", path, 503))["error"]


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
async def test_server_metadata_advertises_what_works_only(server: Server, path: str) -> None:
    metadata = await server.json("GET", path)
    assert (metadata["name"], metadata["version"]) == ("tta-server", __version__)
    assert set(metadata["extensions"]) == {"sequence", "parameters"}


@pytest.mark.parametrize("path", [f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/versions/1"])
async def test_model_metadata(server: Server, path: str) -> None:
    metadata = await server.json("GET", path)
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == (MODEL, ["1"], "pytorch")
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]
    assert metadata["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 5]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 5]},
    ]


# Inference


async def test_without_a_sequence_the_source_answers(server: Server) -> None:
    x = rows(4)
    answer = await server.infer(x)
    torch.testing.assert_close(output(answer), source_scores(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output(answer, "probabilities"), source_scores(x).softmax(1), rtol=1e-4, atol=1e-5)
    assert (answer["model_name"], answer["model_version"]) == (MODEL, "1")
    report = answer["parameters"]
    assert (report["state_version"], report["adapted"], report["policy"]) == (0, False, "source")
    assert "stream_id" not in report
    assert "id" not in answer
    assert await server.json("GET", "/v1/streams") == {"streams": []}


async def test_the_version_may_be_in_the_path(server: Server) -> None:
    body = infer_body(rows(1))
    answer = await server.json("POST", f"/v2/models/{MODEL}/versions/1/infer", json=body)
    assert answer["outputs"] == (await server.json("POST", INFER, json=body))["outputs"]


@pytest.mark.parametrize("chosen", [["logits"], ["probabilities"], ["probabilities", "logits"], []])
async def test_outputs_come_as_asked(server: Server, chosen: list[str]) -> None:
    answer = await server.json("POST", INFER, json=infer_body(rows(2), outputs=chosen))
    assert [one["name"] for one in answer["outputs"]] == (chosen or ["logits", "probabilities"])
    assert all(one["shape"] == [2, 5] and len(one["data"]) == 10 for one in answer["outputs"])


@pytest.mark.parametrize("id", ["request-7", "", "ä\n"])
async def test_the_request_id_comes_back(server: Server, id: str) -> None:
    assert (await server.json("POST", INFER, json=infer_body(rows(1)) | {"id": id}))["id"] == id


async def test_the_request_may_say_json_in_its_own_words(server: Server) -> None:
    """What the stock client sends to ask for JSON; parameters nobody knows are left alone."""
    body = infer_body(rows(1), outputs=["logits"], binary_data_output=False, somebody_elses="x", priority=0)
    body["outputs"][0]["parameters"] = {"binary_data": False}
    body["inputs"][0]["parameters"] = {}
    await server.json("POST", INFER, json=body)


@pytest.mark.parametrize(
    ("datatype", "scale"), [("FP32", 1.0), ("FP64", 1.0), ("FP16", 1.0), ("UINT8", 255.0)], ids=str
)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
async def test_datatypes(server: Server, datatype: str, scale: float, nested: bool) -> None:
    x = (rows(2) * 255).round() / 255
    values = (x * scale).round() if scale > 1 else x
    data = (values if nested else values.flatten()).tolist()
    body = {"inputs": [{"name": "input", "shape": [2, 3, 8, 8], "datatype": datatype, "data": data}]}
    answer = await server.json("POST", INFER, json=body)
    torch.testing.assert_close(output(answer), source_scores(x), rtol=1e-4, atol=1e-4)


# Streams


async def test_a_sequence_is_a_stream(server: Server) -> None:
    answers = []
    for seed in range(3):
        answers.append(await server.infer(rows(4, seed), sequence_id="cam"))
        await server.settled()
    reports = [one["parameters"] for one in answers]
    assert [one["state_version"] for one in reports] == [0, 1, 2]
    assert all((one["stream_id"], one["adapted"], one["policy"]) == ("cam", True, "tent") for one in reports)
    assert "drift" not in reports[0], "not measured yet"
    assert reports[1]["drift"] > 0
    assert all(0 < one["confidence"] <= 1 for one in reports)
    for report in reports:
        assert all(isinstance(value, str | int | float | bool) for value in report.values()), "flat"
    assert (await server.info("cam"))["version"] == 3
    assert (await server.predict("cam", rows(4)))["version"] == 3, "/v1 sees the same stream"


@pytest.mark.parametrize(
    ("given", "id"),
    [("cam:1", "cam:1"), (7, "7"), (2**53 + 1, "9007199254740993"), (2**64 - 1, "18446744073709551615"), ("0", "0")],
    ids=str,
)
async def test_sequence_ids(server: Server, given: str | int, id: str) -> None:
    answer = await server.infer(rows(2), sequence_id=given)
    assert answer["parameters"]["stream_id"] == id
    assert [one["id"] for one in (await server.json("GET", "/v1/streams"))["streams"]] == [id]


@pytest.mark.parametrize("none", [0, ""], ids=repr)
async def test_no_sequence(server: Server, none: Any) -> None:
    answer = await server.infer(rows(2), sequence_id=none, sequence_start=False, sequence_end=False)
    assert "stream_id" not in answer["parameters"]
    assert await server.json("GET", "/v1/streams") == {"streams": []}


async def test_big_ids_stay_apart(server: Server) -> None:
    for id in (2**53, 2**53 + 1):
        await server.infer(rows(2), sequence_id=id)
    assert len((await server.json("GET", "/v1/streams"))["streams"]) == 2


async def test_a_start_on_a_live_id_replaces_it_and_says_so(server: Server) -> None:
    x = rows(4)
    first = await server.infer(x, sequence_id=5, sequence_start=True)
    assert "replaced" not in first["parameters"]
    await server.infer(x, sequence_id=5)
    again = await server.infer(x, sequence_id=5, sequence_start=True)
    assert again["parameters"]["replaced"] is True
    assert again["parameters"]["state_version"] == 0
    assert torch.equal(output(first), output(again))
    assert "replaced" not in (await server.infer(x, sequence_id=5))["parameters"]
    assert (await server.info("5"))["version"] == 2


async def test_an_end_closes_after_this_request(server: Server) -> None:
    await server.infer(rows(4), sequence_id="s")
    last = await server.infer(rows(4), sequence_id="s", sequence_end=True)
    assert last["parameters"]["state_version"] == 1
    await server.json("GET", "/v1/streams/s", 404)
    assert (await server.infer(rows(4), sequence_id="s"))["parameters"]["state_version"] == 0


async def test_start_and_end_in_one_request(server: Server) -> None:
    answer = await server.infer(rows(4), sequence_id="s", sequence_start=True, sequence_end=True)
    assert (answer["parameters"]["stream_id"], answer["parameters"]["state_version"]) == ("s", 0)
    await server.json("GET", "/v1/streams/s", 404)
    await server.settled()
    assert server.service.levels().states == {"device": (0, 0), "host": (0, 0)}


async def test_unknown_ids_can_be_refused(loaded: Loaded) -> None:
    async with running(loaded, streams={"unknown_id": "refuse"}) as server:
        assert "no stream 's'" in (await server.infer(rows(2), 404, sequence_id="s"))["error"]
        assert await server.json("GET", "/v1/streams") == {"streams": []}
        await server.infer(rows(2), sequence_id="s", sequence_start=True)
        assert (await server.infer(rows(2), sequence_id="s"))["parameters"]["state_version"] == 1
        await server.infer(rows(2))


async def test_a_default_stream_takes_requests_without_a_sequence(loaded: Loaded) -> None:
    async with running(loaded, streams={"default": "shared", "unknown_id": "refuse"}) as server:
        answers = [await server.infer(rows(2)), await server.infer(rows(2), sequence_id=0)]
        assert [one["parameters"]["state_version"] for one in answers] == [0, 1]
        assert (await server.info("shared"))["version"] == 2
        await server.infer(rows(2), 404, sequence_id="other")


async def test_our_parameters(server: Server) -> None:
    first = await server.infer(rows(4), sequence_id="s", sequence_start=True, tta_policy="norm", tta_seq=1)
    assert (first["parameters"]["policy"], first["parameters"]["state_version"]) == ("norm", 0)
    again = await server.infer(rows(4), sequence_id="s", tta_seq=1)
    assert again["parameters"].pop("replayed") is True
    assert again == first
    off = await server.infer(rows(4), sequence_id="s", tta_adapt=False, tta_seq=2)
    assert (off["parameters"]["policy"], off["parameters"]["adapted"]) == ("source", False)
    torch.testing.assert_close(output(off), source_scores(rows(4)), rtol=1e-4, atol=1e-5)
    assert (await server.info("s"))["requests"] == 2
    assert "out of order" in (await server.infer(rows(4), 409, sequence_id="s", tta_seq=1))["error"]
    assert "'norm'" in (await server.infer(rows(4), 409, sequence_id="s", tta_policy="tent"))["error"]


async def test_a_timeout_is_in_microseconds(server: Server) -> None:
    gate = await server.hold()
    error = await server.infer(rows(2), 504, sequence_id="s", timeout=1500)
    assert "waited 0.0015 s" in error["error"]
    patient = asyncio.create_task(server.infer(rows(2), sequence_id="s", timeout=0))
    await server.waiting(1)
    gate.open()
    assert (await patient)["parameters"]["state_version"] == 0, "nothing adapted before; 0 means none"


# What a refused request must not do


@pytest.mark.parametrize(
    ("x", "parameters"),
    [
        (rows(2) * 300, {}),
        (torch.zeros(2, 3, 9, 9), {}),
        (torch.zeros(0, 3, 8, 8), {}),
        (rows(2), {"tta_policy": "magic"}),
    ],
    ids=["out of range", "wrong shape", "no rows", "unknown policy"],
)
async def test_a_refused_start_leaves_the_live_stream_alone(
    server: Server, x: Tensor, parameters: dict[str, Any]
) -> None:
    """A request that is refused has no effect: least of all may it destroy what the stream has learnt."""
    for seed in range(3):
        await server.infer(rows(4, seed), sequence_id="s")
    before = await server.info("s")
    response = await server.client.post(INFER, json=infer_body(x, sequence_id="s", sequence_start=True, **parameters))
    assert response.status_code in (400, 404)
    after = await server.info("s")
    assert after["version"] == before["version"] == 3
    assert after["created"] == before["created"]


async def test_a_refused_request_opens_no_stream(server: Server) -> None:
    await server.infer(rows(2) * 300, 400, sequence_id="s")
    assert await server.json("GET", "/v1/streams") == {"streams": []}


async def test_a_start_refused_for_a_full_queue_leaves_the_live_stream_alone(loaded: Loaded) -> None:
    async with running(loaded, limits={"queue": 1}) as server:
        await server.infer(rows(4), sequence_id="s")
        before = await server.info("s")
        gate = await server.hold()
        waiting = asyncio.create_task(server.infer(rows(4)))
        await server.waiting(1)
        await server.infer(rows(4), 429, sequence_id="s", sequence_start=True)
        await server.infer(rows(4), 429, sequence_id="new")
        gate.open()
        await waiting
        after = await server.info("s")
        for kept in ("version", "requests", "created", "tier", "drift"):
            assert after[kept] == before[kept], kept
        assert [one["id"] for one in (await server.json("GET", "/v1/streams"))["streams"]] == ["s"]


async def test_two_starts_at_once_are_both_fresh(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second replaces the first's stream; nobody joins a sequence that is not new."""
    await server.infer(rows(4), sequence_id="s")
    await server.settled()
    gate, engine = Gate(), server.runner.engine
    drop = engine.drop

    def slow_drop(stream: Stream) -> None:
        gate.pass_through()
        drop(stream)

    monkeypatch.setattr(engine, "drop", slow_drop)
    first = asyncio.create_task(server.infer(rows(4), sequence_id="s", sequence_start=True))
    await asyncio.to_thread(gate.reached)
    second = asyncio.create_task(server.infer(rows(4), sequence_id="s", sequence_start=True))
    await server.waiting(1)
    gate.open()
    answers = await asyncio.gather(first, second)
    assert [answer["parameters"]["state_version"] for answer in answers] == [0, 0]
