"""Every error row of the protocol that applies: the status, and ``{"error": text}`` on every route."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.http.conftest import Loaded, Server, infer_body, running
from tests.serving import MODEL, rows
from tta_server.errors import TtaError
from tta_server.http import codec, problems, wire

pytestmark = pytest.mark.anyio

INFER = f"/v2/models/{MODEL}/infer"
PREDICT = "/v1/streams/s/predict"


def error_of(response: httpx.Response, status: int) -> str:
    """The text of an error response, whose form is always the same."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert content.keys() == {"error"}
    text = content["error"]
    assert isinstance(text, str)
    assert text
    return text


def deep(levels: int) -> bytes:
    return b"[" * levels + b"0.5" + b"]" * levels


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def v2(data: Any = (0.5,) * 192, shape: Any = (1, 3, 8, 8), datatype: Any = "FP32", name: Any = "input") -> Any:
    return {"inputs": [{"name": name, "shape": shape, "datatype": datatype, "data": data}]}


async def test_unknown_paths(server: Server) -> None:
    for method, path in (
        ("GET", "/"), ("GET", "/v1"), ("GET", "/v3"), ("POST", "/v1/streams/s/nothing"), ("GET", "/v1/streams/a/b/c"),
        ("GET", f"/v2/models/{MODEL}/versions/1/nothing"), ("DELETE", "/no/such/path"), ("GET", "/v2/models"),
    ):  # fmt: skip
        assert path in error_of(await server.client.request(method, path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/policies", {"GET"}),
        ("DELETE", "/v1/models/tiny", {"GET"}),
        ("POST", "/v1/streams", {"GET"}),
        ("GET", PREDICT, {"POST"}),
        ("GET", INFER, {"POST"}),
        ("POST", "/v2/health/live", {"GET"}),
        ("PUT", "/metrics", {"GET"}),
        ("PATCH", "/v1/streams/s/reset", {"POST"}),
        ("POST", "/openapi.json", {"GET"}),
        ("DELETE", "/docs", {"GET"}),
    ],
)
async def test_wrong_methods(server: Server, method: str, path: str, allowed: set[str]) -> None:
    response = await server.client.request(method, path)
    assert method in error_of(response, 405)
    assert {one.strip() for one in response.headers["allow"].split(",")} >= allowed


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
async def test_a_wrong_method_on_a_stream_tells_all_that_are_allowed(server: Server, method: str) -> None:
    response = await server.client.request(method, "/v1/streams/s")
    error_of(response, 405)
    assert {one.strip() for one in response.headers["allow"].split(",")} == {"PUT", "GET", "PATCH", "DELETE"}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (PREDICT, b"", "the body is empty"),
        (PREDICT, b"{", "not JSON"),
        (PREDICT, b"\xff\xfe\x00", "not JSON"),
        (PREDICT, b'{"inputs": NaN}', "not JSON"),
        (PREDICT, b"[[0.5]]", "must be a JSON object, got list"),
        (PREDICT, b"null", "must be a JSON object"),
        (PREDICT, b"{}", "'inputs'"),
        (PREDICT, b'{"inputs": [], "model": "x"}', "nothing else"),
        (PREDICT, b'{"inputs": "cat"}', "must be numbers"),
        (PREDICT, b'{"inputs": null}', "must be numbers"),
        (PREDICT, b'{"inputs": {"a": 1}}', "must be numbers nested to equal lengths, got an object"),
        (PREDICT, b'{"inputs": [true, false]}', "must be numbers"),
        (PREDICT, b'{"inputs": [[1, 2], [3]]}', "equal lengths"),
        (PREDICT, b'{"inputs": 5}', "[rows, 3, 8, 8], got []"),
        (PREDICT, b'{"inputs": []}', "[rows, 3, 8, 8]"),
        (PREDICT, b'{"inputs": [[0.5, 0.5]]}', "[rows, 3, 8, 8], got [1, 2]"),
        (PREDICT, b'{"inputs": ' + deep(101) + b"}", "equal lengths"),
        (PREDICT, b'{"inputs": ' + deep(10_000) + b"}", "not JSON"),
        (INFER, b"", "not JSON"),
        (INFER, b"nonsense", "not JSON"),
        (INFER, b"[]", "must be a JSON object"),
        (INFER, b"{}", "inputs"),
        (INFER, b'{"inputs": {}}', "inputs"),
        (INFER, b'{"inputs": [5]}', "inputs.0"),
        (INFER, b'{"inputs": [{"name": "input", "datatype": "FP32"}]}', "inputs.0.shape"),
        (INFER, b'{"inputs": []}', "exactly one input"),
        (INFER, b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": "x"}]}', "inputs.0.shape"),
        (INFER, b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": ["a"]}]}', "inputs.0.shape.0"),
        (INFER, b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1.5]}]}', "inputs.0.shape.0"),
        (INFER, b'{"inputs": [{"name": 7, "datatype": "FP32", "shape": [1]}]}', "inputs.0.name"),
        (INFER, b'{"id": 7, "inputs": []}', "id"),
        (INFER, b'{"parameters": {"a": {"b": 1}}, "inputs": []}', "parameters.a"),
        (INFER, b'{"parameters": {"a": [1]}, "inputs": []}', "parameters.a"),
        (INFER, b'{"parameters": [], "inputs": []}', "parameters"),
        (INFER, b'{"outputs": "logits", "inputs": []}', "outputs"),
        (INFER, b'{"inputs": ' + deep(10_000) + b"}", "not JSON"),
    ],
    ids=repr,
)
async def test_bodies_that_are_not_requests(server: Server, path: str, body: bytes, said: str) -> None:
    await server.open("s")
    assert said in error_of(await server.client.post(path, content=body), 400)
    assert (await server.info("s"))["requests"] == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (v2(data=[0.5] * 191), "needs 192 values, got 191"),
        (v2(data=[0.5] * 193), "needs 192 values, got 193"),
        (v2(data=[]), "needs 192 values, got 0"),
        (v2(data=None), "no data"),
        (v2(data="cat"), "must be numbers"),
        (v2(data=[True] * 192), "must be numbers"),
        (v2(data=[None] * 192), "must be numbers"),
        (v2(data=[[0.5] * 100, [0.5] * 92]), "equal lengths"),
        (v2(data=[1e39] * 192), "row 0 holds NaN or infinity"),
        (v2(data=[2.0] * 192), "must lie in [0, 1]"),
        (v2(shape=[1, 192]), "[rows, 3, 8, 8], got [1, 192]"),
        (v2(shape=[192]), "[rows, 3, 8, 8]"),
        (v2(shape=[], data=[0.5]), "[rows, 3, 8, 8], got []"),
        (v2(shape=[0, 3, 8, 8], data=[]), "1 to 1024 rows"),
        (v2(shape=[-1, 3, 8, 8]), "impossible shape"),
        (v2(shape=[-1, -192]), "impossible shape"),
        (v2(shape=[2**40, 2**40]), "impossible shape"),
        (v2(shape=[2**62, 4]), "impossible shape"),
        (v2(shape=[0, 2**63], data=[]), "shape"),
        (v2(shape=[0, 2**62, 8], data=[]), "shape"),
        (v2(shape=[1] * 65, data=[0.5]), "shape"),
        (v2(datatype="INT32"), "got INT32"),
        (v2(datatype="BYTES"), "got BYTES"),
        (v2(datatype="fp32"), "got fp32"),
        (v2(datatype="UINT8", data=[256] * 192), "whole numbers from 0 to 255"),
        (v2(datatype="UINT8", data=[-1] * 192), "whole numbers from 0 to 255"),
        (v2(datatype="UINT8", data=[0.5] * 192), "whole numbers from 0 to 255"),
        (v2(name="image"), "exactly one input, 'input'; got 'image'"),
        ({"inputs": v2()["inputs"] * 2}, "exactly one input"),
        (v2() | {"outputs": [{"name": "classes"}]}, "no output 'classes'; there are logits and probabilities"),
        (v2() | {"outputs": [{"name": "logits"}] * 2}, "asked for twice"),
        (v2() | {"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}, "binary outputs"),
        (v2() | {"parameters": {"binary_data_output": True}}, "binary outputs"),
        (v2() | {"parameters": {"sequence_id": True}}, "sequence_id must be"),
        (v2() | {"parameters": {"sequence_id": 1.5}}, "sequence_id must be"),
        (v2() | {"parameters": {"sequence_id": 2**64}}, "sequence_id must be"),
        (v2() | {"parameters": {"sequence_id": "a b"}}, "1 to 128 of"),
        (v2() | {"parameters": {"sequence_id": "x" * 129}}, "1 to 128 of"),
        (v2() | {"parameters": {"sequence_id": 1, "sequence_start": 1}}, "sequence_start must be bool"),
        (v2() | {"parameters": {"sequence_id": 1, "sequence_end": "yes"}}, "sequence_end must be bool"),
        (v2() | {"parameters": {"tta_adapt": "yes"}}, "tta_adapt must be bool"),
        (v2() | {"parameters": {"tta_adapt": 1}}, "tta_adapt must be bool"),
        (v2() | {"parameters": {"tta_policy": 5}}, "tta_policy must be str"),
        (v2() | {"parameters": {"tta_seq": "1"}}, "tta_seq must be int"),
        (v2() | {"parameters": {"tta_seq": True}}, "tta_seq must be int"),
        (v2() | {"parameters": {"tta_seq": 1.0}}, "tta_seq must be int"),
        (v2() | {"parameters": {"tta_seq": -1, "sequence_id": 1}}, "tta_seq must not be negative"),
        (v2() | {"parameters": {"tta_seq": 1}}, "needs a stream"),
        (v2() | {"parameters": {"tta_sec": 1}}, "no parameter 'tta_sec'; there are: tta_adapt, tta_policy, tta_seq"),
        (v2() | {"parameters": {"tta_": 0, "tta_adapt": False}}, "no parameter 'tta_'; there are"),
        (v2() | {"parameters": {"timeout": "soon"}}, "timeout must be int"),
        (v2() | {"parameters": {"timeout": -1}}, "timeout"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
async def test_tensors_and_parameters_that_do_not_fit(server: Server, body: Any, said: str) -> None:
    assert said in error_of(await server.client.post(INFER, json=body), 400)


async def test_binary_tensors_are_refused_readably(server: Server) -> None:
    response = await server.client.post(
        INFER, content=b"{}" + bytes(8), headers={"Inference-Header-Content-Length": "2"}
    )
    assert "binary_data=False" in error_of(response, 400)


@pytest.mark.parametrize(
    "query",
    ["seq=-1", "seq=x", "adapt=maybe", "timeout=0", "timeout=-1", "timeout=nan", "timeout=x", "output=classes"],
)
async def test_queries_that_do_not_fit(server: Server, query: str) -> None:
    await server.open("s")
    response = await server.client.post(f"{PREDICT}?{query}", json={"inputs": rows(1).tolist()})
    assert query.split("=")[0] in error_of(response, 400)
    assert (await server.info("s"))["requests"] == 0


@pytest.mark.parametrize("query", ["adpat=false", "adapt=false&Seq=3", "=", "x" * 999 + "=1", "output=logits&model="])
async def test_a_query_parameter_that_is_none_is_not_passed_over(server: Server, query: str) -> None:
    await server.open("s")
    response = await server.client.post(f"{PREDICT}?{query}", json={"inputs": rows(1).tolist()})
    text = error_of(response, 400)
    assert text.startswith("no query parameter '")
    assert text.endswith("; there are: seq, adapt, timeout, output")
    assert len(text) < 150
    assert (await server.info("s"))["requests"] == 0


async def test_the_known_query_parameters_are_the_documented_ones(server: Server) -> None:
    document = await server.json("GET", "/openapi.json")
    operation = document["paths"]["/v1/streams/{id}/predict"]["post"]
    documented = {one["name"] for one in operation["parameters"] if one["in"] == "query"}
    await server.open("s")
    text = error_of(await server.client.post(f"{PREDICT}?x=1", json={"inputs": rows(1).tolist()}), 400)
    assert set(text.partition("there are: ")[2].split(", ")) == documented


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("PUT", "/v1/streams/new", {"policy": "magic"}, 404, "no policy 'magic'"),
        ("PUT", "/v1/streams/new", {"model": "huge"}, 404, "no model 'huge'"),
        ("PUT", "/v1/streams/new", {"settings": {"rate": 1}}, 400, "rate"),
        ("PUT", "/v1/streams/new", {"settings": {"lr": "fast"}}, 400, "lr"),
        ("PUT", "/v1/streams/new", {"settings": {"lr": -1}}, 400, "lr must lie in [0, inf), got -1"),
        ("PUT", "/v1/streams/new", {"policy": 5}, 400, "policy"),
        ("PUT", "/v1/streams/new", {"adapt": "on"}, 400, "adapt"),
        ("PUT", "/v1/streams/new", {"adapt": 1}, 400, "adapt"),
        ("PUT", "/v1/streams/new", {"nonsense": 1}, 400, "nonsense"),
        ("PUT", "/v1/streams/new", [], 400, "JSON object"),
        ("PUT", "/v1/streams/a%20b", {}, 400, "1 to 128 of"),
        ("PUT", "/v1/streams/" + "x" * 129, {}, 400, "1 to 128 of"),
        ("PUT", "/v1/streams/%C3%A4", {}, 400, "1 to 128 of"),
        ("PUT", "/v1/streams/s", {"policy": "norm"}, 409, "runs policy 'tent'"),
        ("PUT", "/v1/streams/s", {"settings": {"lr": 0.5}}, 409, "'lr': 0.5"),
        ("PATCH", "/v1/streams/s", {}, 400, "adapt"),
        ("PATCH", "/v1/streams/s", {"adapt": 1}, 400, "adapt"),
        ("PATCH", "/v1/streams/s", {"adapt": None}, 400, "adapt"),
        ("PATCH", "/v1/streams/s", {"adapt": True, "policy": "norm"}, 400, "policy"),
        ("PATCH", "/v1/streams/nobody", {"adapt": True}, 404, "no stream 'nobody'"),
        ("GET", "/v1/streams/nobody", None, 404, "no stream 'nobody'"),
        ("DELETE", "/v1/streams/nobody", None, 404, "no stream 'nobody'"),
        ("POST", "/v1/streams/nobody/reset", None, 404, "no stream 'nobody'"),
        ("POST", "/v1/streams/nobody/predict", {"inputs": [0.5]}, 404, "no stream 'nobody'"),
        ("GET", "/v1/policies/magic", None, 404, "no policy 'magic'"),
        ("GET", "/v1/models/huge", None, 404, "no model 'huge'"),
        ("GET", "/v2/models/huge", None, 404, "no model 'huge'; there are: tiny"),
        ("GET", "/v2/models/huge/ready", None, 404, "no model 'huge'"),
        ("POST", "/v2/models/huge/infer", infer_body(rows(1)), 404, "no model 'huge'"),
        ("GET", "/v2/models/tiny/versions/2", None, 404, "version 1 only"),
        ("GET", "/v2/models/tiny/versions/2/ready", None, 404, "version 1 only"),
        ("POST", "/v2/models/tiny/versions/01/infer", infer_body(rows(1)), 404, "version 1 only"),
    ],
)
async def test_streams_and_names(server: Server, method: str, path: str, body: Any, status: int, said: str) -> None:
    opened = await server.open("s")
    response = await server.client.request(method, path, json=body)
    assert said in error_of(response, status)
    assert (await server.json("GET", "/v1/streams"))["streams"] == [opened], "nothing changed"


async def test_a_policy_that_cannot_run_on_the_model_is_a_conflict(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.tent import Tent

    monkeypatch.setattr(Tent, "needs", frozenset({"fisher"}))
    response = await server.client.put("/v1/streams/s", json={"policy": "tent", "settings": {"lr": 0.02}})
    assert "needs fisher" in error_of(response, 409)


async def test_numbers_out_of_order_are_a_conflict(server: Server) -> None:
    await server.open("s")
    await server.predict("s", rows(1), seq=5)
    response = await server.client.post(f"{PREDICT}?seq=4", json={"inputs": rows(1).tolist()})
    assert "request number 4 of stream 's' is out of order: 5 came before" in error_of(response, 409)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_values_that_are_not_finite_leave_the_stream_alone(server: Server, value: float) -> None:
    await server.open("s")
    await server.predict("s", rows(4))
    x = rows(4).numpy()
    x[2, 1, 3, 3] = value
    assert "row 2 holds NaN or infinity" in error_of(await server.client.post(PREDICT, content=npy(x)), 400)
    info = await server.info("s")
    assert (info["version"], info["requests"]) == (1, 1)


# Limits


async def test_rows_over_the_limit(loaded: Loaded) -> None:
    async with running(loaded, limits={"rows_per_request": 2}) as server:
        await server.open("s")
        responses = [
            await server.client.post(PREDICT, json={"inputs": rows(3).tolist()}),
            await server.client.post(INFER, json=infer_body(rows(3))),
        ]
        for response in responses:
            assert "limits.rows_per_request" in error_of(response, 400)


@pytest.mark.parametrize("path", [PREDICT, INFER])
@pytest.mark.parametrize("inline", [True, False], ids=["inline", "thread"])
async def test_memory_that_does_not_suffice_is_the_bodys_fault(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, inline: bool
) -> None:
    def no_memory(*_: Any) -> Any:
        raise MemoryError

    await server.open("s")
    monkeypatch.setattr(codec, "_numbers", no_memory)
    monkeypatch.setattr(wire, "DECODE_INLINE", 2**20 if inline else 0)
    body = {"inputs": rows(1).tolist()} if path == PREDICT else infer_body(rows(1))
    assert "not enough memory" in error_of(await server.client.post(path, json=body), 413)
    assert (await server.info("s"))["requests"] == 0


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    """A body of unknown length; it says when more of it is read than a bounded reader would."""
    for start in range(0, len(body), 100):
        assert start <= 1000, "the server reads on beyond its limit"
        yield body[start : start + 100]


@pytest.mark.parametrize("path", [PREDICT, INFER, "/v1/streams/s"])
@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
async def test_bodies_over_the_limit(loaded: Loaded, path: str, chunked: bool) -> None:
    async with running(loaded, limits={"body_bytes": 900}) as server:
        await server.open("s")
        method, body = "PUT" if path.endswith("/s") else "POST", b" " * 5000
        response = await server.client.request(method, path, content=pieces(body) if chunked else body)
        assert "limits.body_bytes = 900" in error_of(response, 413)
        assert ("content-length" in response.request.headers) is not chunked


async def test_a_body_at_the_limit_is_read(loaded: Loaded) -> None:
    body = json.dumps({"policy": "tent"}).encode()
    async with running(loaded, limits={"body_bytes": len(body)}) as server:
        assert (await server.client.put("/v1/streams/s", content=body)).status_code == 201
        error_of(await server.client.put("/v1/streams/t", content=body + b" "), 413)


async def test_an_encoded_body_is_not_mistaken_for_a_plain_one(server: Server) -> None:
    await server.open("s")
    for path, body in ((PREDICT, {"inputs": rows(1).tolist()}), (INFER, infer_body(rows(1)))):
        response = await server.client.post(path, json=body, headers={"Content-Encoding": "br"})
        assert "br" in error_of(response, 415)


async def test_full_queues_say_when_to_come_back(loaded: Loaded) -> None:
    async with running(loaded, limits={"queue_per_stream": 1, "queue": 2, "streams": 2}) as server:
        for id in ("s", "t"):
            await server.open(id)
        gate = await server.hold()
        tasks = [asyncio.create_task(server.predict("s", rows(1)))]
        await server.waiting(1)
        body = {"inputs": rows(1).tolist()}
        full = {"limits.queue_per_stream = 1": await server.client.post(PREDICT, json=body)}
        tasks.append(asyncio.create_task(server.predict("t", rows(1))))
        await server.waiting(2)
        full["limits.queue = 2"] = await server.client.post(INFER, json=infer_body(rows(1)))
        full["limits.streams = 2"] = await server.client.put("/v1/streams/u")
        for said, response in full.items():
            assert said in error_of(response, 429)
            assert int(response.headers["retry-after"]) >= 1
        gate.open()
        await asyncio.gather(*tasks)


async def test_time_that_ran_out(server: Server) -> None:
    await server.open("s")
    gate = await server.hold()
    body = {"inputs": rows(1).tolist()}
    error_of(await server.client.post(f"{PREDICT}?timeout=0.001", json=body), 504)
    gate.open()
    info = await server.info("s")
    assert (info["version"], info["requests"]) == (0, 0)


async def test_a_server_that_shuts_down_says_so(loaded: Loaded) -> None:
    async with running(loaded) as server:
        await server.open("s")
        await server.service.drain()
        responses = [
            await server.client.post(PREDICT, json={"inputs": rows(1).tolist()}),
            await server.client.post(INFER, json=infer_body(rows(1))),
            await server.client.post("/v1/streams/s/reset"),
            await server.client.get("/v2/health/ready"),
            await server.client.get(f"/v2/models/{MODEL}/ready"),
        ]
        for response in responses:
            assert "shutting down" in error_of(response, 503)
            assert int(response.headers["retry-after"]) >= 1


# Faults of our own


async def test_a_step_that_fails(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    await server.open("s")

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(server.runner.engine, "step", broken)
    error_of(await server.client.post(PREDICT, json={"inputs": rows(1).tolist()}), 500)


async def test_an_unexpected_error_shows_its_kind_and_nothing_else(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    await server.open("s")
    monkeypatch.setattr(server.service._dispatcher, "launch", broken)
    monkeypatch.setattr(server.service, "open", broken)
    for response in (
        await server.client.put("/v1/streams/t"),
        await server.client.post(PREDICT, json={"inputs": rows(1).tolist()}),
    ):
        assert error_of(response, 500) == "internal error: ZeroDivisionError"


def kinds(of: type[TtaError]) -> set[type[TtaError]]:
    """All classes below ``of``."""
    direct = set(of.__subclasses__())
    return direct.union(*map(kinds, direct))


def test_every_error_of_ours_has_its_status() -> None:
    from tta_server.errors import ConfigError

    ours = {kind for kind in kinds(TtaError) if kind.__module__ == TtaError.__module__}
    assert ours - {ConfigError} <= problems.STATUS.keys()
